"""``isorun.tune``: the command that its job runs, and what is refused before it is submitted."""

import pytest

from launch.cli import COMMANDS
from launch.contract import Commands
from tests.launch.launching import role
from train.exits import UsageError

SPACE = "optim.lr: {type: float, low: 1.0e-4, high: 1.0e-1, log: true}\n"
BASE = ["--config", "configs/digits.yaml"]


@pytest.fixture
def words(tmp_path):
    """The first arguments of the component."""
    (tmp_path / "space.yaml").write_text(SPACE)
    return [*BASE, "--space", str(tmp_path / "space.yaml")]


def parsed(made):
    """What ``isorun tune`` understands."""
    assert made.entrypoint == "python"
    assert made.args[:3] == ["-m", "launch", "tune"]
    plain = [word.replace("$$", "$") for word in made.args[2:]]
    return Commands("launch.commands", COMMANDS, "").parse(plain, "isorun")


def test_the_job_runs_tune_with_its_trials_on_the_node(words):
    made = role(
        "isorun.tune", *words, "-j", "1x2", "--parallel", "3", "--trials", "7", "--objective",
        "accuracy,loss:min", "--sampler", "tpe:n_startup_trials=2", "--max_retries", "4",
        "run.dir=/runs/s$x", "run.name=rates",
    )  # fmt: skip
    found = parsed(made)
    assert (found.trials, found.parallel, found.processes) == ("7", "3", "2")
    assert found.objective == ["accuracy", "loss:min"]
    assert found.sampler == "tpe:n_startup_trials=2"
    assert found.config == BASE[1:]
    assert found.overrides == ["run.dir=/runs/s$x", "run.name=rates"]
    assert (made.num_replicas, made.max_retries) == (1, 4)
    assert made.resource.cpu == 12, "two cores for each of six processes"
    assert made.env["WANDB_JOB_TYPE"] == "tune"
    assert made.env["WANDB_RUN_GROUP"] == "rates"


def test_the_gpus_of_the_node_are_shared_by_the_trials(words):
    assert parsed(role("isorun.tune", *words, "--gpu", "8", "--parallel", "4")).processes == "2"
    with pytest.raises(UsageError, match="--parallel is 4, but the node has 2 GPUs"):
        role("isorun.tune", *words, "--gpu", "2", "--parallel", "4")


def test_the_trials_can_be_jobs_of_a_scheduler(words):
    made = role(
        "isorun.tune", *words, "--scheduler", "slurm", "--cfg", "partition=gpu,time=01:00:00", "-j",
        "2x8", "--job", "h=gpu_h100_8,image=mine", "--parallel", "4", "--objective", "accuracy",
    )  # fmt: skip
    found = parsed(made)
    assert (found.scheduler, found.cfg, found.j) == ("slurm", "partition=gpu,time=01:00:00", "2x8")
    assert found.job == ["h=gpu_h100_8", "image=mine"]
    assert (found.processes, found.parallel) == (None, "4")
    assert made.resource.cpu == 2, "the job of the study trains nothing"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["-j", "2x2"], "the trials of this job run on its one node"),
        (["--cfg", "partition=x"], "--cfg partition=x is for trials that are jobs"),
        (["--parallel", "0"], "--parallel must be a whole number of at least 1"),
        (["--trials", "-1"], "--trials must not be negative"),
        (["--sampler", "tpee"], "did you mean tpe"),
        (["--pruner", "median", "--objective", "loss,accuracy"], "cannot prune"),
        (["optim.lrr=1"], "did you mean optim.lr"),
        (["-j", "1x128"], "128"),
    ],
)
def test_mistakes_are_reported_before_submission(words, more, said):
    with pytest.raises(UsageError) as caught:
        role("isorun.tune", *words, *more)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_the_image_are_not_read_without_the_check():
    made = role(
        "isorun.tune", "--config", "/in/image.yaml", "--space", "/in/space.yaml", "--check", "False",
        "run.name=mine",
    )  # fmt: skip
    assert parsed(made).space == "/in/space.yaml"
    assert made.env["WANDB_RUN_GROUP"] == "mine"
    with pytest.raises(UsageError, match=r"/in/space\.yaml"):
        role("isorun.tune", *BASE, "--space", "/in/space.yaml")
