"""``fit`` with the options for the length of a run, for checkpoints and for retention."""

import errno
import json
import shutil
import sys
from pathlib import Path

import pytest

import train
from tests.support.forked import quick_run, run
from tests.support.runs import TINY, assert_same_bits, checkpoints, curve, metrics, state, tensors
from tests.support.tiny import Noisy, TinyTask
from train.cli import main
from train.exits import DataError, RetryError, UsageError


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    run("fit", directory, "evaluate.every_steps=5")
    return directory


def finished(directory):
    return json.loads((directory / "finished.json").read_text())


@pytest.mark.parametrize(
    ("epochs", "steps"), [("2.0", 18), ("0.5", 5), ("0.001", 1), ("2.9126213592233010", 25)]
)
def test_length_in_epochs(tmp_path, epochs, steps):
    """103 samples, 12 a step; the last step may exceed the length. 2.91262... epochs are 300
    samples."""
    run("fit", tmp_path, "length.steps=null", f"length.epochs={epochs}", "schedule.warmup_steps=0")
    assert finished(tmp_path)["step"] == steps
    assert finished(tmp_path)["position"] == 12 * steps
    last = curve(tmp_path, "train/learning_rate")[steps]
    assert last < 1e-4 or steps == 1, "the schedule must end with the run"


def test_a_warmup_longer_than_the_epochs_is_refused_once_the_data_is_loaded(tmp_path):
    rules = ["length.steps=null", "length.epochs=0.5", "schedule.warmup_steps=6"]
    done = run("fit", tmp_path, *rules, expect=64)
    (line,) = done.stderr.splitlines()
    assert "schedule.warmup_steps is 6 (command line), which is longer than the run of 5" in line


def test_retention(undisturbed, tmp_path):
    """Keeps the two newest, every twentieth step, and the one with the best evaluation."""
    run(
        "fit", tmp_path, "evaluate.every_steps=5", "checkpoint.every_steps=5",
        "checkpoint.keep_last=2", "checkpoint.keep_every_steps=20",
        "checkpoint.keep_best.metric=loss",
    )  # fmt: skip
    losses = curve(tmp_path, "eval/loss")
    best = min(losses, key=losses.get)
    assert best not in (20, 35, 40), "the best step must not be kept by another rule"
    assert checkpoints(tmp_path) == sorted({20, 35, 40, best})
    assert_same_bits(tensors(undisturbed), tensors(tmp_path))


def test_the_best_checkpoints_are_kept_after_a_restart(tmp_path):
    rules = [
        "evaluate.every_steps=5", "checkpoint.every_steps=5", "checkpoint.keep_last=1",
        "checkpoint.keep_best.mode=min", "checkpoint.keep_best.keep=2",
    ]  # fmt: skip
    run("fit", tmp_path, *rules, "task.kill_at_step=23", "checkpoint.asynchronous=false", expect=-9)
    run("fit", tmp_path, *rules)
    losses = curve(tmp_path, "eval/loss")
    best = sorted(losses, key=losses.get)[:2]
    assert max(best) < 23, "both best steps must be before the restart"
    assert checkpoints(tmp_path) == sorted({40, *best})


def test_synchronous_saving_gives_the_same_run(undisturbed, tmp_path):
    run("fit", tmp_path, "evaluate.every_steps=5", "checkpoint.every_steps=3",
        "checkpoint.asynchronous=false", "checkpoint.keep_last=99")  # fmt: skip
    assert checkpoints(tmp_path) == [*range(3, 40, 3), 40]
    assert_same_bits(tensors(undisturbed), tensors(tmp_path))
    assert curve(undisturbed) == curve(tmp_path)


@pytest.mark.slow
def test_checkpoints_by_minutes(undisturbed, tmp_path):
    """Every 0.1 s with steps of 20 ms: more than once, but not at each step."""
    rules = [
        "evaluate.every_steps=5",
        f"checkpoint.every_minutes={0.1 / 60}",
        "checkpoint.keep_last=99",
    ]
    run("fit", tmp_path, *rules, "task.sleep=0.02")
    assert 2 <= len(checkpoints(tmp_path)) <= 20
    assert_same_bits(tensors(undisturbed), tensors(tmp_path))


def test_evaluation_by_epochs_and_at_the_start(tmp_path):
    """Half epochs of 51.5 samples end within steps 5, 9, 13, 18 ..."""
    run("fit", tmp_path, "evaluate.every_epochs=0.5", "evaluate.at_start=true", "length.steps=20")
    assert list(curve(tmp_path, "eval/loss")) == [0, 5, 9, 13, 18, 20]


def test_a_longer_run_is_refused_without_allow_changes(undisturbed, tmp_path):
    """With --allow-changes, a finished run continues to the new length."""
    constant = ["schedule.use=constant", "schedule.warmup_steps=0"]
    run("fit", tmp_path, *constant, "length.steps=20")
    refused = run("fit", tmp_path, *constant, expect=76)
    assert "length.steps: 20 -> 40 (command line)" in refused.stderr
    run("fit", tmp_path, *constant, "--allow-changes")
    assert finished(tmp_path)["step"] == 40
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, 41))
    assert "all well" in run("verify", tmp_path).stdout


def test_progress_is_in_plain_lines_without_a_terminal(tmp_path):
    done = run("fit", tmp_path)
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "step 7/40  loss " in done.stdout
    for said in (
        "Finished: 40 steps, 480 samples.",
        "checkpoints   ",
        "metrics       ",
        "-m train verify",
    ):
        assert said in done.stdout
    assert state(tmp_path)["progress"]["position"] == 480


def test_a_changed_number_of_samples_is_refused_without_allow_changes(tmp_path):
    """The config is the same, but the data behind it has changed."""
    half = ["length.steps=20", "schedule.use=constant", "schedule.warmup_steps=0"]
    run("fit", tmp_path, *half)
    config = json.loads((tmp_path / "config.json").read_text())
    config["data"]["size"] = 90
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "finished.json").unlink()
    refused = run("fit", tmp_path, *half, "data.size=90", expect=76)
    assert "has 90 samples, but had 103 when step 20 was saved" in refused.stderr
    run("fit", tmp_path, *half, "data.size=90", "--allow-changes")


class ShiftedTask(TinyTask):
    """The data changes behind the same config: by a file in the run directory."""

    def train_dataset(self):
        data = super().train_dataset()
        data.x += Path(self.config.run.dir, "shift").exists()
        return data


def test_changed_samples_are_refused_without_allow_changes(tmp_path):
    options = ["task.use=tests.commands.test_fit:ShiftedTask", "length.steps=6"]
    options += ["schedule.use=constant", "schedule.warmup_steps=0", "checkpoint.every_steps=3"]
    run("fit", tmp_path, *options)
    shutil.rmtree(tmp_path / "checkpoints/step-000000000006")
    (tmp_path / "finished.json").unlink()
    (tmp_path / "shift").touch()
    refused = run("fit", tmp_path, *options, expect=76)
    assert (
        "The training data has another sample 0['x'] than when step 3 was saved" in refused.stderr
    )
    run("fit", tmp_path, *options, "--allow-changes")


def test_only_rank_0_prints(tmp_path):
    done = quick_run("fit", tmp_path, "length.steps=10", processes=2)
    assert done.stdout.count("Finished: 10 steps") == 1
    assert done.stdout.count("step 10/10  loss ") == 1
    assert (tmp_path / "logs/rank-1.log").exists()


class Leaving(train.Hook):
    def on_step_end(self, facts):
        sys.exit(0)


def leave(*_):
    sys.exit(0)


HOOK = "hooks=[tests.commands.test_fit:Leaving]"


@pytest.mark.parametrize(
    ("broken", "overrides", "said", "code"),
    [
        (None, [HOOK], "The hook 'tests.commands.test_fit:Leaving' failed in on_step_end", 70),
        ((TinyTask, "misbehave"), [], r"sys.exit\(0\) was called in test_fit.py:\d+ \(leave\)", 70),
        ((Noisy, "__getitem__"), [], "Noisy failed at index .* with SystemExit: 0; fix", 65),
    ],
)
def test_sys_exit_in_the_user_s_code_is_an_error(
    tmp_path, monkeypatch, broken, overrides, said, code
):
    if broken:
        monkeypatch.setattr(*broken, leave)
    with pytest.raises(train.RunError, match=said) as caught:
        train.fit(*TINY, f"run.dir={tmp_path}", "track.console=quiet", *overrides)
    assert caught.value.code == code
    assert checkpoints(tmp_path) == []


def test_sys_exit_does_not_become_the_exit_code_of_a_command(monkeypatch, capsys):
    monkeypatch.setattr("train.commands.schema.run", leave)
    assert main(["schema"]) == 70
    assert "isorun: error: sys.exit(0) was called in test_fit.py:" in capsys.readouterr().err


def test_a_module_that_exits_when_it_is_imported_is_named(tmp_path, monkeypatch):
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(UsageError, match=r"task.use \(.*'leaving', which calls sys.exit"):
        train.load_config(*TINY, "task.use=leaving:Task")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            TypeError("not JSON"),
            70,
            r"could not be written \(TypeError: not JSON\); correct the code",
        ),
        (OSError(28, "No space left on device"), 75, "could not be written; free some space"),
        (
            OSError(30, "Read-only file system"),
            75,
            r"could not be written; fix the cause, then rerun \(OSError: .* Read-only",
        ),
    ],
)
@pytest.mark.parametrize("on_error", ["warn", "stop"])
def test_only_a_failure_of_the_storage_is_worth_a_retry(
    tmp_path, monkeypatch, error, code, said, on_error
):
    def fail(*_):
        raise error

    monkeypatch.setattr("train.checkpoint.store.CheckpointStore.commit", fail)
    if on_error == "stop":
        said = "The run ends because checkpoint.on_error is stop"
    with pytest.raises(train.RunError, match=said) as caught:
        train.fit(
            *TINY, f"run.dir={tmp_path}", "track.console=quiet", "length.steps=6",
            f"checkpoint.on_error={on_error}",
        )  # fmt: skip
    assert caught.value.code == code


def test_a_run_directory_that_becomes_read_only_is_a_fault_of_the_machine(tmp_path, monkeypatch):
    """A file system protects itself so after a fault of its disk."""

    def fail(directory, _values):
        raise OSError(errno.EROFS, "Read-only file system", str(directory.finished_path))

    monkeypatch.setattr("train.checkpoint.run_directory.RunDirectory.mark_finished", fail)
    with pytest.raises(RetryError, match=r"cannot be written any more .* step 6\. Rerun"):
        train.fit(*TINY, f"run.dir={tmp_path}", "track.console=quiet", "length.steps=6")


def test_a_length_in_epochs_holds_after_a_change_of_the_batch_size(tmp_path):
    """8 steps of 12 samples, then steps of 24: 2 epochs of 103 samples are complete after 5."""
    length = ["length.steps=null", "length.epochs=2", "checkpoint.every_steps=4"]
    length += ["checkpoint.asynchronous=false", "evaluate.every_epochs=1"]
    run("fit", tmp_path, *length, "task.kill_at_step=10", expect=-9)
    run("fit", tmp_path, *length, "batch.global_batch_size=24", "--allow-changes")
    finished = json.loads((tmp_path / "finished.json").read_text())
    assert (finished["step"], finished["position"]) == (8 + 5, 8 * 12 + 5 * 24)
    assert list(curve(tmp_path, "eval/loss")) == [9, 13], "at the end of each epoch"


def test_a_config_may_change_until_there_is_a_checkpoint(tmp_path):
    def fit(*words):
        return train.fit(
            *TINY, f"run.dir={tmp_path}", "length.steps=6", "track.console=quiet", *words
        )

    with pytest.raises(DataError, match="this sample is broken"):
        fit("early_stop.metric=loss", "optim.lr=0.03", "run.seed=1", "data.fail_at=3")
    done = fit("early_stop.metric=loss", "optim.lr=0.02")
    assert done.step == 6
    changes = done.run.attempts[1]["changes"]
    assert "optim.lr: 0.03 -> 0.02" in changes
    assert "run.seed: 1 -> 0" in changes
    assert main(["verify", *TINY, f"run.dir={tmp_path}"]) == 0
    with pytest.raises(train.RunError, match="optim.lr: 0.02 -> 0.01"):
        fit("early_stop.metric=loss")


def test_a_schedule_that_does_not_exist_is_named_with_its_origin(tmp_path):
    with pytest.raises(
        UsageError, match=r"schedule.use \(command line\) names the module 'nosuch'"
    ):
        train.fit(*TINY, f"run.dir={tmp_path}", "schedule.use=nosuch:f")
