"""``verify`` finds any damage of a run, and reports none for an intact run."""

import shutil

import pytest

from tests.support.forked import run


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    run("fit", directory, "checkpoint.every_steps=10")
    return directory


@pytest.fixture
def finished(finished_once, tmp_path):
    return shutil.copytree(finished_once, tmp_path / "run")


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_an_intact_run(finished):
    assert run("verify", finished).stdout.splitlines() == [
        "checkpoint step 30: ok",
        "checkpoint step 40: ok",
        "ledger: 40 steps, positions 0 to 479, each used exactly once, in 1 attempt(s)",
        "all well",
    ]


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
@pytest.mark.parametrize("at", [0, 300, -2])
def test_a_single_flipped_bit_is_found(finished, name, at):
    flip(finished / "checkpoints/step-000000000030" / name, at)
    lines = run("verify", finished, expect=65).stdout.splitlines()
    assert lines[0].startswith("checkpoint step 30: ")
    assert f"step-000000000030/{name} " in lines[0]
    assert lines[1] == "checkpoint step 40: ok"
    assert lines[-1] == "NOT well"


def test_a_single_flipped_bit_in_the_ledger_is_found(finished):
    for at in (3, 16 + 20, 16 + 44 * 7 + 30, 16 + 44 * 40 + 43):
        flip(finished / "ledger.bin", at)
        done = run("verify", finished, expect=65)
        assert done.stdout.splitlines()[-1] == "NOT well", at
        flip(finished / "ledger.bin", at)
    run("verify", finished)


def test_verify_changes_nothing(finished):
    def state():
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in finished.rglob("*")}

    flip(finished / "checkpoints/step-000000000030/.metadata", 9)
    before = state()
    run("verify", finished, expect=65)
    assert state() == before


def test_a_killed_run_and_a_run_that_does_not_exist(tmp_path):
    run("fit", tmp_path / "killed", "task.kill_at_step=5", expect=-9)
    done = run("verify", tmp_path / "killed")
    assert "checkpoints: none yet" in done.stdout
    assert "no step is committed yet" in done.stdout
    done = run("verify", tmp_path / "none", expect=64)
    (line,) = done.stderr.splitlines()
    assert f"There is no run in {tmp_path / 'none'} (run.dir)" in line
    assert not (tmp_path / "none").exists()


def test_a_finished_run_without_its_last_checkpoint_is_reported(finished):
    shutil.rmtree(finished / "checkpoints/step-000000000040")
    done = run("verify", finished, expect=65)
    assert "checkpoint step 40: missing, but the run finished at this step" in done.stdout
    assert "NOT well" in done.stdout
