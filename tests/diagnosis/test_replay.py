"""``isorun replay``: steps of a run computed again."""

import json
import shutil

import pytest
import torch

from tests.diagnosis.test_overfit import BASE
from tests.support.forked import command, run
from train.data.ledger import read_steps
from train.exits import Exit

STEPS = ["checkpoint.every_steps=5", "checkpoint.keep_last=9", "length.steps=17"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("replay") / "run"
    run("fit", directory, "batch.micro_batch_size=3", *STEPS, "track.log_every_steps=2")
    return directory


def files(directory):
    """Name, time and size of all files."""
    return {
        path: (path.stat().st_mtime_ns, path.stat().st_size)
        for path in directory.rglob("*")
        if path.is_file()
    }


def replay(directory, *words, expect=0):
    return json.loads(command("replay", directory, *words, "--json", expect=expect).stdout)


def test_a_step_gives_what_was_logged_and_saved(made):
    before = files(made)
    found = replay(made, "--step", "15")
    assert found["same"] is True
    assert found["from"] == 10
    assert {row["step"] for row in found["compared"]} == {12, 14}
    assert {row["difference"] for row in found["compared"]} == {0.0}
    assert found["weights"] == []  # none differs from those of the checkpoint
    assert files(made) == before


@pytest.mark.slow
def test_another_placement_gives_the_same(made):
    found = replay(made, "--step", "12", "--on", "2:fsdp2", "--tolerance", "1e-5")
    assert [row["name"] for row in found["compared"]] == ["train/loss", "train/gradient_norm"]
    assert found["weights"] is None  # step 12 has no checkpoint


def test_a_computation_that_differs_is_found(made):
    # Counted from the start of the process: step 13. Its update is skipped.
    done = command("replay", made, "--step", "15", "task.nan_at_steps=[12]", expect=Exit.DATA)
    assert "NOT the same" in done.stdout
    assert "tensors differ; the first is 0.weight, on rank 0" in done.stdout


def test_without_a_checkpoint_before_it_the_run_starts_anew(made):
    found = replay(made, "--step", "4")
    assert (found["from"], found["same"]) == (0, True)


def test_the_samples_of_the_step_are_saved(made, tmp_path):
    replay(made, "--step", "7", "--batch", tmp_path / "step.pt")
    saved = torch.load(tmp_path / "step.pt", weights_only=True)
    indices = [index for micro in saved for index in micro["indices"]]
    of_run = {step.step: step for step in read_steps(made / "ledger.bin")}
    assert len(indices) == 12
    assert saved[0]["batch"]["x"].shape == (3, 8)
    assert 7 in of_run


def test_the_module_of_the_first_value_that_is_not_finite_is_named(tmp_path):
    directory = tmp_path / "run"
    words = [
        "task.how=overflow",
        "track.wandb=disabled",
        "length.steps=4",
        "batch.micro_batch_size=16",
    ]
    run("fit", directory, *words, base=BASE)
    found = replay(directory, "--step", "4", "--anomaly", "--from", "1")
    assert set(found["not_finite"].values()) == {"0 (Linear), whose input is not finite already"}
    assert len(found["not_finite"]) == 1
    assert found["same"] is True


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--step", "18"], Exit.USAGE, "has steps 1 to 17"),
        (["--step", "0"], Exit.USAGE, "has steps 1 to 17"),
        (["--step", "9", "optim.lr=0.5"], Exit.RESUME_REFUSED, "optim.lr: 0.01 -> 0.5"),
        (["--step", "9", "--on", "2-ddp"], Exit.USAGE, "'2-ddp' is not a placement"),
        (["--step", "9", "--batch", "/dev/null/x"], Exit.USAGE, "--batch is '/dev/null/x'"),
    ],
)
def test_bad_arguments_are_one_sentence(made, words, code, text):
    assert text in command("replay", made, *words, expect=code).stderr


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    done = command("replay", tmp_path, "--step", "1", expect=Exit.USAGE)
    assert "without config.json" in done.stderr


def test_a_damaged_checkpoint_is_not_used(made, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(made, copy)
    data = next((copy / "checkpoints" / "step-000000000010").glob("*.distcp"))
    data.write_bytes(bytes(data.stat().st_size))
    done = command("replay", copy, "--step", "12", expect=Exit.DATA)
    assert "step-000000000010 is damaged" in done.stderr
