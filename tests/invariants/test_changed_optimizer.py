"""``--allow-changes`` with another optimiser, on every strategy."""

import json
import shutil

import pytest

from tests.support.forked import run, run_ranks
from tests.support.lanes import slow
from tests.support.runs import curve, state
from train.checkpoint.layout import dumps_with_sha256

BASE = ["checkpoint.every_steps=10", "checkpoint.asynchronous=false", "length.steps=20"]
KILLED = [*BASE, "task.kill_at_step=16", "optim.clip_norm=null"]
LIMITED = ["optim.clip_norm=null"]


@pytest.fixture(scope="module")
def of_adamw(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adamw") / "run"
    run("fit", directory, *KILLED, expect=-9)
    return directory


@pytest.fixture
def killed(of_adamw, tmp_path):
    """A run with AdamW that was killed after step 15, with a checkpoint of step 10."""
    return shutil.copytree(of_adamw, tmp_path / "run")


@pytest.mark.parametrize(
    "now",
    [
        ["optim.use=adagrad"],
        slow(["optim.use=sgd"]),
        slow(["optim.use=rmsprop"]),
        slow(["optim.use=nadam"]),
        slow(["optim.use=adafactor"]),
        ["optim.options={amsgrad: true}"],
    ],
)
def test_the_state_of_another_optimizer_is_dropped_and_reported(killed, now):
    done = run("fit", killed, *BASE, *LIMITED, *now, "--allow-changes")
    (warning,) = done.stderr.splitlines()
    assert "when step 10 was saved, so the optimiser starts without the saved state" in warning
    assert "resumes at step 10" in done.stdout
    assert len(curve(killed)) == 20
    assert "all well" in run("verify", killed).stdout


def test_the_state_is_kept_between_adamw_and_adam_but_not_its_options(killed):
    """AdamW decouples weight decay by an option that is stored with the parameter group."""
    done = run("fit", killed, *BASE, *LIMITED, "optim.use=adam", "--allow-changes")
    assert "without the saved state" not in done.stderr
    groups = state(killed)["optimizer_groups"]
    assert [group["decoupled_weight_decay"] for group in groups] == [False, False]


def test_an_option_that_was_removed_is_not_restored(tmp_path):
    run("fit", tmp_path, *KILLED, "optim.options={amsgrad: true}", expect=-9)
    run("fit", tmp_path, *BASE, *LIMITED, "--allow-changes")
    assert [group["amsgrad"] for group in state(tmp_path)["optimizer_groups"]] == [False, False]


def test_a_checkpoint_of_an_older_version_is_compared_by_the_config(killed):
    path = killed / "checkpoints/step-000000000010/manifest.json"
    body = json.loads(path.read_text())
    del body["sha256"], body["state"]["optim"]
    path.write_text(dumps_with_sha256(body))
    done = run("fit", killed, *BASE, *LIMITED, "optim.use=adagrad", "--allow-changes")
    assert "optim.use is 'adagrad', but was 'adamw' when step 10 was saved" in done.stderr


@pytest.mark.parametrize(
    "change", ["schedule.use=constant", slow("optim.no_decay=[]"), slow("optim.betas=[0.8,0.9]")]
)
def test_other_changes_keep_the_state(killed, change):
    done = run("fit", killed, *BASE, *LIMITED, change, "optim.weight_decay=0.1", "--allow-changes")
    assert "without the saved state" not in done.stderr
    assert "resumes at step 10" in done.stdout


def test_an_added_average_of_weights_is_refused_in_a_sentence(killed):
    done = run("fit", killed, *BASE, *LIMITED, "ema.decay=0.9", "--allow-changes", expect=76)
    (line,) = done.stderr.splitlines()
    assert "does not match the model: ema." in line
    assert "is not in the checkpoint" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "use"),
    [
        ("ddp", "sgd"), ("fsdp2", "nadam"), ("zero1", "rmsprop"), ("zero2", "nadam"),
        ("zero3", "sgd"),
    ],
)  # fmt: skip
def test_every_strategy_drops_the_state(of_adamw, killed, tmp_path, strategy, use):
    changed = [*BASE, *LIMITED, f"optim.use={use}", "--allow-changes", "batch.micro_batch_size=6"]
    alone = shutil.copytree(of_adamw, tmp_path / "alone")
    run("fit", alone, *changed)
    first, _ = run_ranks(2, "fit", killed, *changed, f"strategy={strategy}")
    assert "starts without the saved state" in first.stderr
    assert curve(killed) == pytest.approx(curve(alone), rel=1e-4)
