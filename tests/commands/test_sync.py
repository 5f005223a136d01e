"""The command sync: W&B gets what it lacks of runs, in order, and nothing twice."""

import json
import shutil

import pytest

pytest.importorskip("wandb")

from tests.support.forked import Command, run
from tests.support.runs import ROOT, curve
from tests.support.wandb_server import WandbServer
from train.checkpoint.run_directory import RunDirectory
from train.track.wandb_log import transaction_logs

OFFLINE = ["track.wandb=offline", "track.log_every_steps=1", "checkpoint.every_steps=5"]


@pytest.fixture
def server():
    with WandbServer() as server:
        yield server


def sync(*words, server=None, expect=0):
    """What the command prints."""
    env = {"WANDB_API_KEY": "", **(server.environment if server else {})}
    done = Command("sync", *map(str, words), env=env).wait()
    assert done.returncode == expect, done
    return done.stdout + done.stderr


def wandb_id(directory):
    return json.loads((directory / "run.json").read_text())["wandb_id"]


@pytest.fixture(scope="module")
def three_attempts(tmp_path_factory):
    """A run of which the second attempt's rows are lost, as after a kill."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    for steps in (10, 15, 20):
        run("fit", directory, *OFFLINE, f"length.steps={steps}", "--allow-changes")
        (directory / "finished.json").unlink(missing_ok=True)
    second = transaction_logs(directory)[1]
    second.write_bytes(second.read_bytes()[:7])  # killed before the first record
    return directory


def test_all_is_uploaded_once_and_in_order(three_attempts, server, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(three_attempts, runs / "run", symlinks=True)
    said = sync(runs, server=server)
    assert said.count("uploaded offline-run-") == 2
    assert server.runs[wandb_id(runs / "run")].steps == list(range(1, 21))
    losses = {row["step"]: row["train/loss"] for row in server.runs[wandb_id(runs / "run")].history}
    assert losses == curve(runs / "run")
    before = list(server.operations)
    assert "W&B has all of its rows" in sync(runs / "run", server=server)
    assert server.operations == before, "nothing is asked of the server"
    assert not (ROOT / "wandb").exists(), "W&B writes its logs in the run directory"


@pytest.mark.slow
def test_an_interrupted_upload_is_continued(three_attempts, server, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(three_attempts, directory, symlinks=True)
    server.fault = lambda operation: "hang" if operation == "file_stream" else None
    said = sync(directory, "--timeout", 5, server=server, expect=75)
    assert "W&B did not take wandb/offline-run-" in said
    assert "run the command again" in said
    server.fault = None
    sync(directory, server=server)
    assert server.runs[wandb_id(directory)].steps == list(range(1, 21))


@pytest.mark.slow
def test_a_server_that_takes_no_more_of_a_checkpoint_is_given_up(three_attempts, server, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(three_attempts, directory, symlinks=True)
    sync(directory, server=server)
    server.fault = lambda operation: "hang" if operation == "artifact_upload" else None
    words = [directory, "--checkpoints", "best", "--timeout", 2]
    assert "W&B did not take the checkpoints" in sync(*words, server=server, expect=75)


@pytest.mark.parametrize(
    ("words", "expect", "sentence"),
    [
        (["nothing"], 64, "'nothing' is not a run directory and holds none"),
        (["RUN", "--timeout", "0"], 64, "--timeout must be above 0"),
        (["RUN"], 64, "There are no credentials for W&B"),
    ],
)
def test_mistakes_are_one_sentence(three_attempts, words, expect, sentence):
    words = [str(three_attempts) if word == "RUN" else word for word in words]
    assert sentence in sync(*words, expect=expect)


def test_runs_without_wandb_and_running_ones_are_left_out(tmp_path, server):
    for name in ("disabled", "running"):
        run("fit", tmp_path / name, "length.steps=2", "schedule.warmup_steps=0")
    busy = RunDirectory(tmp_path / "running")
    busy.acquire()
    said = sync(tmp_path, server=server)
    assert "disabled: left out: the run has track.wandb=disabled." in said
    assert "running: left out: " in said
    assert server.runs == {}
    assert "is in use by process" in sync(tmp_path / "running", server=server, expect=76)
    busy.release()
