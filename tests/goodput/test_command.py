"""``isorun goodput``: its tables, its JSON, and runs of which nothing can be told."""

import json

import pytest

from tests.goodput.simulated import Simulated
from tests.support.forked import run as train
from tests.support.forked import run_ranks, start, wait_for
from tests.support.runs import checkpoints
from train.cli import main
from train.exits import Exit
from train.goodput.clock import PhaseClock
from train.goodput.read import read_goodput


@pytest.fixture
def run(tmp_path):
    """A finished run with one kill: 600 s of compute, of which 100 s are lost."""
    (tmp_path / "run.json").write_text("{}")
    simulated = Simulated(tmp_path)
    simulated.begin(age=20.0)
    for step in range(3):
        simulated.take_step(0, 50, 50, 0)
        if step == 1:
            simulated.save()
            simulated.commit()
    simulated.flush()
    simulated.die()
    simulated.idle(180)
    simulated.begin()
    for _ in range(3):
        simulated.take_step(0, 50, 50, 0)
    simulated.save()
    simulated.commit()
    simulated.finish(Exit.DONE)
    return tmp_path


def rows(text):
    """The numbers of a table's rows by the words before them."""
    found = {}
    for line in text.splitlines():
        name, *values = line.rsplit(maxsplit=3) if line.endswith("%") else [line]
        if values:
            found[name.strip()] = values
    return found


def test_the_table_has_each_phase_the_goodput_and_the_attempts(run, capsys):
    assert main(["goodput", str(run)]) == 0
    said = capsys.readouterr().out
    table = rows(said)
    assert table["start-up"] == ["20.0", "2.5", "%"]
    assert table["compute"] == ["500.0", "62.5", "%"]
    assert table["lost work"] == ["100.0", "12.5", "%"]
    assert table["idle between attempts"] == ["180.0", "22.5", "%"]
    assert table["wall time"] == ["800.0", "100.0", "%"]
    assert "goodput: 62.5 % (500.0 s of committed compute in 800.0 s)" in said
    first, second = said.splitlines()[-2:]
    assert first.endswith("not recorded                0          2     1")
    assert second.endswith("0 DONE                      2          3     0")
    assert "cost" not in said


def test_a_price_gives_the_cost_of_the_attempts_and_of_lost_work(run, capsys):
    assert main(["goodput", str(run), "--price-per-hour", "36"]) == 0
    assert "cost: 6.20 for 0.17 h of attempts" in (said := capsys.readouterr().out)
    assert "1.00 for lost work" in said
    assert main(["goodput", str(run), "--json", "--price-per-hour", "36"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["cost"] == pytest.approx(6.2)
    assert values["cost_of_lost_work"] == pytest.approx(1.0)
    assert values["percent"] == pytest.approx(62.5)
    assert sum(values["seconds"].values()) == pytest.approx(values["wall_seconds"])
    assert [a["exit"] for a in values["attempts"]] == [None, 0]


@pytest.mark.parametrize("price", ["-1", "nan", "32.77$", "1e999"])
def test_a_price_that_is_none_is_refused(run, price, capsys):
    assert main(["goodput", str(run), f"--price-per-hour={price}"]) == Exit.USAGE
    assert repr(price) in capsys.readouterr().err


def test_runs_of_which_nothing_can_be_told(tmp_path, capsys):
    assert main(["goodput", str(tmp_path / "none")]) == Exit.USAGE
    assert "There is no run in" in capsys.readouterr().err
    (tmp_path / "run.json").write_text("{}")
    assert main(["goodput", str(tmp_path)]) == Exit.USAGE
    assert "earlier version" in capsys.readouterr().err
    ledger = tmp_path / "goodput.jsonl"
    ledger.write_text('{"attempt"')
    assert main(["goodput", str(tmp_path)]) == Exit.DATA
    assert str(ledger) in capsys.readouterr().err
    ledger.unlink()
    ledger.symlink_to(tmp_path / "run.json")
    assert main(["goodput", str(tmp_path)]) == Exit.RESUME_REFUSED
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert str(ledger) in errors[0]


@pytest.mark.parametrize(("submitted", "queued"), [("{}", 30), ("soon", 0), ("", 0), ("inf", 0)])
def test_a_process_knows_when_it_was_submitted(monkeypatch, submitted, queued):
    began = PhaseClock.of_process().started_at
    monkeypatch.setenv("ISORUN_SUBMITTED_AT", submitted.format(began - 30))
    found = PhaseClock.of_process()
    waited = 0 if found.submitted_at is None else found.started_at - found.submitted_at
    assert waited == pytest.approx(queued, abs=1)


def test_rank_0_of_two_accounts_for_both(tmp_path):
    run_ranks(2, "fit", tmp_path, "length.steps=6", "strategy=ddp")
    goodput = read_goodput(tmp_path)
    (attempt,) = goodput.attempts
    assert (attempt.exit, attempt.committed, attempt.lost) == (0, 6, 0)
    assert goodput.seconds["rendezvous"] > 0
    assert goodput.seconds["wait"] > 0


def test_a_failed_run_has_its_exit_code_and_what_it_lost(tmp_path):
    train("fit", tmp_path, "checkpoint.every_steps=2", "batch.global_batch_size=10",
          "data.fail_at=3", "length.steps=40", expect=65)  # fmt: skip
    (attempt,) = read_goodput(tmp_path).attempts
    assert attempt.exit == Exit.DATA
    newest = max(checkpoints(tmp_path), default=0)
    assert attempt.committed == newest
    assert attempt.seconds["lost"] > 0


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_accounts_for_all_of_its_time(tmp_path):
    options = ["checkpoint.every_steps=5", "task.sleep=0.02"]
    first = start("fit", tmp_path, *options, "length.steps=400")
    wait_for(first, lambda: max(checkpoints(tmp_path), default=0) >= 20)
    first.signal(9)
    first.wait()
    killed = read_goodput(tmp_path, now=1e12)
    assert killed.attempts[0].exit is None
    assert killed.attempts[0].committed >= 20
    train("fit", tmp_path, *options, "length.steps=400", "stop.deadline=60")
    goodput = read_goodput(tmp_path)
    one, two = goodput.attempts
    assert (one.attempt, two.attempt, two.exit) == (1, 2, 0)
    assert one.committed == two.resumed >= 20
    assert one.committed + two.committed == 400
    assert goodput.wall == pytest.approx(two.ended - one.started, rel=0.01)
    assert min(goodput.seconds.values()) >= 0
    for phase in ("start", "restore", "data", "compute", "evaluation", "shutdown", "idle"):
        assert goodput.seconds[phase] > 0, phase
    assert goodput.seconds["queued"] == 0
    finished = json.loads((tmp_path / "finished.json").read_text())["goodput"]
    assert finished["attempts"] == 2
    # What comes after is the shutdown.
    assert 0 < goodput.wall - finished["wall_seconds"] <= goodput.seconds["shutdown"] + 0.01
    assert finished["compute_seconds"] == pytest.approx(goodput.seconds["compute"], abs=0.01)
