"""I3 and I4 if the machine with the run directory is lost: the run resumes from the mirror."""

import json
import shutil
import signal

import pytest

from tests.support.forked import run, run_ranks, start, wait_for
from tests.support.lanes import slow
from tests.support.runs import assert_same_bits, curve, tensors
from train.checkpoint.checkpoint_config import MirrorConfig
from train.checkpoint.mirror import Mirror

BASE = ["checkpoint.every_steps=5", "batch.micro_batch_size=6", "evaluate.every_steps=10"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    run("fit", directory, *BASE)
    return directory


@pytest.fixture
def mirror(tmp_path):
    return Mirror(MirrorConfig(url=f"file://{tmp_path}/mirror"))


def with_mirror(tmp_path):
    return [*BASE, f"checkpoint.mirror.url=file://{tmp_path}/mirror"]


def identity(directory):
    return json.loads((directory / "run.json").read_text())


@pytest.mark.parametrize("ranks", [slow(1), 2])
def test_a_lost_run_directory_is_restored(undisturbed, tmp_path, mirror, ranks):
    options, directory = with_mirror(tmp_path), tmp_path / "run"
    process = start("fit", directory, *options, "task.sleep=0.05")
    wait_for(process, mirror.steps)
    process.signal(signal.SIGKILL)
    process.wait()
    born = identity(directory)
    shutil.rmtree(directory)
    if ranks == 1:
        done = run("fit", directory, *options)
    else:
        done = run_ranks(2, "fit", directory, *options, "strategy=fsdp2")[0]
    assert f" from file://{tmp_path}/mirror." in done.stdout + done.stderr
    assert identity(directory) == born
    attempts = [json.loads(line) for line in (directory / "attempts.jsonl").open()]
    assert [a["attempt"] for a in attempts] == [1, 2]
    assert attempts[1]["resumed_from_step"] >= 5
    assert "all well" in run("verify", directory).stdout
    assert_same_bits(tensors(undisturbed), tensors(directory))
    for key in ("train/loss", "eval/loss"):
        assert curve(undisturbed, key) == curve(directory, key)
    assert mirror.steps()[-1] == 40, "the run ended before the last upload"


def test_a_changed_config_is_refused_after_a_restore(tmp_path):
    options, directory = with_mirror(tmp_path), tmp_path / "run"
    run("fit", directory, *options, "length.steps=10")
    shutil.rmtree(directory)
    done = run("fit", directory, *options, "length.steps=10", "optim.lr=0.5", expect=76)
    assert "optim.lr: 0.01 -> 0.5 (command line)" in done.stderr
    for result in run_ranks(2, "fit", directory, *options, "length.steps=10", "optim.lr=0.5",
                            expect=76):  # fmt: skip
        assert "optim.lr: 0.01 -> 0.5 (command line)" in result.stderr


def test_a_new_run_is_refused_if_the_mirror_has_copies_of_another_run(tmp_path):
    options = [*with_mirror(tmp_path), "length.steps=10"]
    run("fit", tmp_path / "run", *options)
    run("fit", tmp_path / "other", *BASE, "length.steps=5")
    done = run("fit", tmp_path / "other", *options, "--allow-changes", expect=76)
    assert "set a separate URL for each run" in done.stderr


@pytest.mark.slow
def test_a_stop_does_not_wait_for_the_mirror(tmp_path):
    """The mirror's address does not respond: the run continues, stops and reports the missing
    uploads."""
    mirror = [
        "checkpoint.mirror.url=s3://bucket/run", "stop.deadline=6", "stop.margin=1",
        "checkpoint.mirror.options={endpoint_url: 'http://127.0.0.1:9', anon: true}",
    ]  # fmt: skip
    run("fit", tmp_path, *BASE, "length.steps=5")
    process = start("fit", tmp_path, *BASE, *mirror, "task.sleep=0.1", "--allow-changes")
    wait_for(process, lambda: 7 in curve(tmp_path))
    process.signal(signal.SIGTERM)
    done = process.wait()
    assert done.returncode == 143, done.stderr
    assert "cannot be reached now" in done.stderr
    assert "the next start of this run uploads the rest" in done.stderr


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [(["checkpoint.mirror.url=nosuch://x"], 64, "checkpoint.mirror.url is 'nosuch://x', which can"),
     (["checkpoint.mirror.url=s3://x", "checkpoint.mirror.options.key=abc"], 64, "set secrets in the envir"),
     slow((["checkpoint.mirror.url=s3://x/y", "checkpoint.mirror.options={anon: true, "
            "endpoint_url: 'http://127.0.0.1:9'}"], 75, "to start from the beginning"))],
    ids=["unknown", "secret", "unreachable"],
)  # fmt: skip
def test_bad_input(tmp_path, options, code, said):
    done = run("fit", tmp_path, *options, expect=code)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
