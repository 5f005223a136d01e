"""An invalid config is refused in one clear sentence, before anything heavy is imported."""

import os
import subprocess
import sys

import pytest

from train.config.changes import differences
from train.config.load import load_config
from train.distributed.world import this_world
from train.exits import UsageError

GOOD = ["task.use=digits", "batch.global_batch_size=32", "length.steps=10"]


def load(tmp_path, *overrides):
    return load_config([], [*GOOD, f"run.dir={tmp_path}/run", *overrides])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "optim.lrr=1",
            "optim.lrr is not a known key (value 1, from command line); did you mean optim.lr?",
        ),
        (
            "optim.learning_rate=1",
            "optim.learning_rate is not a known key (value 1, from command line); did you mean "
            "optim.lr?",
        ),
        ("num_workers=1", "; did you mean loader.workers?"),
        ("watchdog.zzz=1", "; the keys of watchdog are"),
        (
            "length.epochs=2",
            "length needs exactly one of length.steps and length.epochs, but has both; set one to "
            "null, such as length.steps=null (length.steps from ",
        ),
        ("lr=1", "lr is not a known key (value 1, from command line); did you mean optim.lr?"),
        ("optim.lr=fast", "optim.lr must be a number, but is 'fast' (from command line)."),
        ("optim.lr=-1", "optim.lr must be greater than 0.0, but is -1 (from command line)."),
        ("optim.lr=true", "optim.lr must be a number, but is True (from command line)."),
        ("compile=maybe", "compile must be true or false, but is 'maybe' (from command line)."),
        (
            "length.steps=1.5",
            "length.steps must be a whole number, but is 1.5 (from command line).",
        ),
        (
            "precision=fp61",
            "precision must be one of fp32, bf16, fp16, but is 'fp61' (from command line)",
        ),
        ("schedule.use=cosin", "did you mean cosine?"),
        ("optim.use=adammw", "but is 'adammw' (from command line); did you mean adamw?"),
        (
            "batch.micro_batch_size=x",
            "batch.micro_batch_size must be a whole number or auto, but is 'x' (from command line).",
        ),
        ("strategy=FSDP2", "but is 'FSDP2' (from command line); did you mean fsdp2?"),
        ("hooks=[1]", "hooks.0 must be module:Class, or a mapping with use and options, but is 1"),
        ("hooks=[{options: {}}]", "set it in the list hooks (from command line)."),
        ("task=text", "but is 'text' (from command line); did you mean task.use=text?"),
        ("optim=3", "optim must be a mapping of keys to values, but is 3 (from command line)."),
        ("model.chanels=[1]", "model.chanels is not a known key"),
        ("data.test_ratoi=0.5", "did you mean data.test_ratio?"),
        ("task.use=digit", "did you mean digits?"),
        ("task.use=nowhere.at:All", "'nowhere'"),
        ("task.use=os:PathLike", "not a subclass of train.tasks.base.Task"),
        ("task=null", "task.use is required"),
        ("length.epochs=3", "exactly one of length.steps and length.epochs"),
        ("schedule.warmup_steps=11", "longer than the run of 10 steps"),
        ("schedule.use=step", "schedule.step_size"),
        ("batch.micro_batch_size=64", "64"),
        ("run.seed=-1", "run.seed must be at least 0"),
    ],
)
def test_invalid_values_are_refused(tmp_path, override, expected):
    with pytest.raises(UsageError) as error:
        load(tmp_path, override)
    assert expected in str(error.value)
    assert "\n" not in str(error.value), "the error must be one sentence about one value"


def test_a_valid_config_has_defaults_for_all_values(tmp_path):
    loaded = load(tmp_path, "optim.lr=3e-4")
    assert loaded.config.optim.lr == 3e-4
    assert loaded.values()["task"]["use"] == "digits"
    assert str(loaded.run_directory) == f"{tmp_path}/run"


def test_missing_required_keys_are_named(tmp_path):
    with pytest.raises(UsageError) as error:
        load_config([], ["task.use=digits"])
    lines = str(error.value).splitlines()
    assert [line.partition(" or as ")[2] for line in lines] == [
        "batch.global_batch_size=... on the command line.",
        "length.steps=... or length.epochs=... on the command line.",
    ]
    with pytest.raises(UsageError, match=r"task is required .* or as task.use=\.\.\. on"):
        load_config([], GOOD[1:])


def test_a_dotted_key_of_a_file_is_to_be_nested(tmp_path):
    (tmp_path / "a.yaml").write_text("optim.lr: 1e-3\n")
    with pytest.raises(UsageError, match=r"optim.lr is not a known key .*optim: {lr: \.\.\.}\.$"):
        load_config([str(tmp_path / "a.yaml")], GOOD)


def test_a_directory_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"run.dir is .*file/run' \(from command line\)"):
        load_config([], [*GOOD, f"run.dir={tmp_path}/file/run"])


def test_a_read_only_directory_is_refused(tmp_path):
    # /proc refuses writes even for root.
    with pytest.raises(UsageError, match="run.dir is '/proc/isorun'"):
        load_config([], [*GOOD, "run.dir=/proc/isorun"])
    del tmp_path


@pytest.fixture
def launched(monkeypatch):
    """Sets the variables of a launcher for this test."""

    def launched(**variables):
        this_world.cache_clear()
        rendezvous = {"MASTER_ADDR": "here", "MASTER_PORT": "29500"}
        for name, value in {**rendezvous, **variables}.items():
            monkeypatch.setenv(name, value)

    # A copy, because this_world adds variables to it and removes blank ones.
    monkeypatch.setattr(os, "environ", {**os.environ})
    yield launched
    this_world.cache_clear()


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0", "WORLD_SIZE": "5"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "5"},
    ],
)
def test_a_batch_too_small_for_the_world_size_is_refused(tmp_path, launched, variables):
    launched(**variables)
    with pytest.raises(UsageError, match=r"batch.global_batch_size.* 5 "):
        load(tmp_path, "batch.global_batch_size=4", "batch.micro_batch_size=1")


def test_variables_of_a_launcher_are_read_as_the_run_reads_them(tmp_path, launched):
    launched(RANK="", WORLD_SIZE=" ")
    load(tmp_path)
    launched(RANK="0", WORLD_SIZE="two")
    with pytest.raises(UsageError, match="WORLD_SIZE must be a whole number .* 'two'"):
        load(tmp_path)


def test_a_config_is_checked_without_heavy_imports(tmp_path):
    code = (
        "import sys\n"
        "from train.cli import main\n"
        f"code = main(['fit', 'run.dir={tmp_path}/run', 'optim.lrr=3', *{GOOD!r}])\n"
        "heavy = {'torch', 'accelerate', 'wandb', 'tensorboard', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 64, done.stderr
    assert done.stderr.count("\n") == 1
    assert "did you mean optim.lr?" in done.stderr
    assert not os.path.exists(tmp_path / "run"), "the run directory was created"


def test_the_home_directory_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    loaded = load_config([], [*GOOD, "run.dir=~/x"], runs=False)
    assert loaded.run_directory == tmp_path / "x"
    assert loaded.config.run.dir == str(tmp_path / "x"), "a task would write to another directory"


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("run.dir=~nobody_here/x", "there is no home directory for ~nobody_here"),
        ("run.dir=s3://bucket/x", "the path of a directory, not a URL"),
        ("run.dir=file:///x", "the path of a directory, not a URL"),
        ("checkpoint.mirror.url=''", "must be the URL of a folder"),
        ("checkpoint.mirror.url='file://'", "must be the URL of a folder"),
    ],
)
def test_a_place_that_is_none(override, reason):
    with pytest.raises(UsageError, match=reason):
        load_config([], [*GOOD, override], runs=False)


def test_one_run_is_named_and_no_checkpoint_in_its_place(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="are both directories of runs; name one"):
        load_config([str(tmp_path / "a"), str(tmp_path / "b")], [], runs=False)
    checkpoint = tmp_path / "a/checkpoints/step-000000000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="name the run, and the checkpoint with --checkpoint"):
        load_config([str(checkpoint)], [], runs=False)


def test_differences_tell_which_keys_change_results(tmp_path):
    before = load(tmp_path, "optim.lr=0.1").config.model_dump(mode="json")
    now = load(tmp_path, "optim.lr=0.2", "track.log_every_steps=3", "loader.workers=2").config
    found = {d.key: d.changes_results for d in differences(now, before)}
    assert found == {
        "optim.lr": True,
        "track.log_every_steps": False,
        "loader.workers": False,
    }
