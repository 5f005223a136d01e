"""The section ``profile``: traces of a run, in its directory and in TensorBoard."""

import json
from pathlib import Path

import pytest

from tests.support.forked import command, run, run_ranks
from train.exits import Exit
from train.profiling.files import find_traces
from train.profiling.trace import read_profile

PROFILED = ["profile.wait=1", "profile.warmup=1", "profile.active=2", "length.steps=12"]


def names(directory):
    return [str(t.path.relative_to(directory)) for t in find_traces(directory)]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """A run with two traces, which was finished, and then made longer."""
    directory = tmp_path_factory.mktemp("profiled") / "run"
    words = [*PROFILED, "profile.repeat=2", "track.tensorboard=true"]
    first = run("fit", directory, *words)
    second = run("fit", directory, *words, "length.steps=16", "profile.repeat=1", "--allow-changes")
    return directory, first, second


def test_traces_by_the_schedule_in_each_attempt(profiled):
    directory, first, second = profiled
    assert names(directory) == [
        "profile/attempt-1/rank-0-step-4.pt.trace.json.gz",
        "profile/attempt-1/rank-0-step-8.pt.trace.json.gz",
        "profile/attempt-2/rank-0-step-16.pt.trace.json.gz",
    ]
    assert "rank-0-step-4.pt.trace.json.gz" in first.stdout
    assert not list((directory / "profile").rglob(".*"))  # no temporary files
    assert "warning" not in (first.stderr + second.stderr).lower()


def test_a_trace_has_the_steps_of_its_schedule(profiled):
    directory = profiled[0]
    found = read_profile(find_traces(directory)[0].path)
    assert found.steps == 2
    assert found.shares["compute"] > 0
    assert found.shares["data"] > 0


def test_tensorboards_plugin_finds_the_traces(profiled):
    directory = profiled[0]
    shown = sorted((directory / "tensorboard" / "profile").rglob("*.gz"))
    assert [str(p.relative_to(directory / "tensorboard/profile")) for p in shown] == [
        "attempt-1/rank-0.4.pt.trace.json.gz",
        "attempt-1/rank-0.8.pt.trace.json.gz",
        "attempt-2/rank-0.16.pt.trace.json.gz",
    ]
    assert shown[0].read_bytes() == find_traces(directory)[0].path.read_bytes()


def test_the_newest_trace_of_a_run_is_shown(profiled, tmp_path):
    directory = profiled[0]
    done = command("profile", directory, "--to", tmp_path)
    assert "attempt 2, steps up to 16" in done.stdout
    assert "host and other" in done.stdout
    assert (tmp_path / "rank-0-step-16.pt.trace.json.gz").exists()
    values = json.loads((tmp_path / "profile.json").read_text())
    assert sum(values["shares"].values()) == pytest.approx(1.0)


def test_the_profile_does_not_change_results(profiled, tmp_path):
    run("fit", tmp_path / "run", "length.steps=12")
    assert not (tmp_path / "run" / "profile").exists()

    def losses(directory):
        rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
        return {r["step"]: r.get("train/loss") for r in rows if r["step"] <= 12}

    assert losses(tmp_path / "run") == losses(profiled[0])


def test_ranks_that_are_named_record(tmp_path):
    words = [*PROFILED, "profile.ranks=[1,5]", "strategy=fsdp2"]
    main, _ = run_ranks(2, "fit", tmp_path / "run", *words)
    assert names(tmp_path / "run") == ["profile/attempt-1/rank-1-step-4.pt.trace.json.gz"]
    assert "profile.ranks names 5, but there are only the ranks 0 to 1" in main.stderr


def test_a_link_in_place_of_the_directory_is_not_followed(tmp_path):
    directory, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    directory.mkdir()
    elsewhere.mkdir()
    (directory / "profile").symlink_to(elsewhere)
    done = run("fit", directory, *PROFILED)
    assert "Profiling failed" in done.stderr
    assert done.stderr.count("Profiling failed") == 1
    assert not list(elsewhere.iterdir())


def test_a_run_that_ends_while_it_is_recorded_writes_the_steps_so_far(tmp_path):
    run("fit", tmp_path / "run", *PROFILED, "profile.active=100")
    (trace,) = find_traces(tmp_path / "run")
    assert read_profile(trace.path).steps >= 10


def test_a_run_without_traces_is_profiled_as_a_config(tmp_path):
    run("fit", tmp_path / "run", "length.steps=8")
    before = sorted(p for p in Path(tmp_path / "run").rglob("*"))
    done = command("profile", tmp_path / "run", "--steps", "1", "--warmup", "0")
    assert "1 steps, " in done.stdout
    assert sorted(p for p in Path(tmp_path / "run").rglob("*")) == before


def test_a_damaged_trace_is_named(tmp_path):
    run("fit", tmp_path / "run", "length.steps=8")
    folder = tmp_path / "run" / "profile" / "attempt-1"
    folder.mkdir(parents=True)
    (folder / "rank-0-step-2.pt.trace.json.gz").write_bytes(b"damaged")
    done = command("profile", tmp_path / "run", expect=Exit.DATA)
    assert "rank-0-step-2.pt.trace.json.gz is no trace of torch.profiler" in done.stderr
