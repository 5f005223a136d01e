"""``export`` writes parameters and a program; both load in a new process and agree."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import train
from tests.faults.mounts import small_disk
from tests.support.forked import run
from tests.support.runs import ROOT, TINY, assert_same_bits, environment, tensors, tiny_config
from tests.support.tiny import TinyTask
from train.checkpoint.manifest import Manifest
from train.cli import main
from train.commands.export import Exported
from train.config.load import load_config
from train.exits import UsageError
from train.strategies.meta_init import build_full_model
from train.tasks.base import Task

QUIET = ["track.tensorboard=false", "track.wandb=disabled"]
DIGITS = ["task.use=digits", "batch.global_batch_size=32", "length.steps=3", *QUIET]
TEXT = [
    "task.use=text", "task.sample_tokens=4", "model.layers=1", "model.heads=2", "model.width=16",
    "data.context=32", "batch.global_batch_size=4", "length.steps=2", *QUIET,
]  # fmt: skip

FRESH = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
import train

for name in sys.argv[1:]:
    directory = Path(name)
    module = train.load(directory, trust=True)
    assert not module.training
    stored = load_file(directory / "model.safetensors")
    state = module.state_dict()
    assert set(stored) <= set(state) and all(torch.equal(state[n], stored[n]) for n in stored)
    program = torch.export.load(directory / "model.pt2").module()
    inputs = torch.load(directory / "inputs.pt")
    for size in (1, 2, 7):
        given = [torch.cat([i] * 4)[:size] for i in inputs]
        with torch.no_grad():
            torch.testing.assert_close(module(*given), program(*given), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.save(module(*inputs), directory / "outputs.pt")
    print("same", directory.name)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Maps the name of a task to the directories of its run and its export."""
    import torch

    from train.config.load import load_config

    found = {}
    for name, base in (("tiny", TINY), ("digits", DIGITS), ("text", TEXT)):
        directory = tmp_path_factory.mktemp(name)
        run("fit", directory / "run", base=base)
        to = directory / f"export-{name}"
        done = run("export", directory / "run", "--to", to, base=base)
        files = ["model.safetensors", "model.pt2", "export.json"]
        assert done.stdout.splitlines() == [str(to / file) for file in files]
        assert done.stderr == ""
        loaded = load_config([], base, runs=False)
        torch.manual_seed(1)
        inputs = loaded.task(loaded.config).example_inputs()
        inputs = tuple(torch.randn_like(i) if i.is_floating_point() else i for i in inputs)
        torch.save(list(inputs), to / "inputs.pt")
        found[name] = directory / "run", to
    return found


@pytest.mark.slow
def test_both_forms_load_in_a_new_process(exported):
    import torch

    directories = [str(to) for _, to in exported.values()]
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *directories],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "same",
        "export-tiny",
        "same",
        "export-digits",
        "same",
        "export-text",
    ]
    # The outputs are those of the trained weights.
    from train.config.load import load_config

    directory, to = exported["digits"]
    stored = tensors(directory)
    loaded = load_config([], DIGITS, runs=False)
    module = loaded.task(loaded.config).build_model().eval()
    module.load_state_dict({n: stored[f"model.{n}"] for n in module.state_dict()})
    with torch.no_grad():
        expected = module(*torch.load(to / "inputs.pt"))
    assert torch.equal(torch.load(to / "outputs.pt"), expected)


@pytest.mark.slow
def test_a_tied_weight_is_stored_once_and_tied_again_when_loaded(exported):
    import train

    _, to = exported["text"]
    module = train.load(to)
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    unique = [name for name, _ in module.named_parameters()]
    assert len(names) == len(unique) + 1


def test_an_export_names_its_run_step_and_config(exported):
    directory, to = exported["digits"]
    description = json.loads((to / "export.json").read_text())
    identity = json.loads((directory / "run.json").read_text())
    assert description["task"] == "digits"
    assert description["run"] == identity["id"]
    assert description["step"] == 3
    assert description["config"]["batch"]["global_batch_size"] == 32
    assert set(description["metrics"]) == {"loss", "accuracy"}


def test_the_default_directory_and_a_single_form(exported):
    directory, _ = exported["tiny"]
    run("export", directory, "--form", "parameters")
    default = directory / "exports/step-40"
    assert sorted(os.listdir(default)) == ["export.json", "model.safetensors"]
    assert len({(default / name).stat().st_mode for name in os.listdir(default)}) == 1, (
        "by the umask"
    )
    run("export", directory, "--form", "program", "--to", directory / "program")
    assert sorted(os.listdir(directory / "program")) == ["export.json", "model.pt2"]


def test_an_earlier_checkpoint_is_exported(tmp_path):
    from safetensors.torch import load_file

    run("fit", tmp_path / "run", "checkpoint.every_steps=30")
    run(
        "export",
        tmp_path / "run",
        "--checkpoint",
        "30",
        "--to",
        tmp_path / "to",
        "--form",
        "parameters",
    )
    stored = tensors(tmp_path / "run", 30)
    exported = load_file(tmp_path / "to/model.safetensors")
    assert_same_bits({n: stored[f"model.{n}"] for n in exported}, exported)
    assert json.loads((tmp_path / "to/export.json").read_text())["step"] == 30


def test_load_refuses_what_is_not_a_valid_export(exported, tmp_path):
    import train
    from train.exits import DataError, UsageError

    with pytest.raises(UsageError, match="is not an export of isorun"):
        train.load(tmp_path)
    _, to = exported["tiny"]
    (tmp_path / "export.json").write_text(
        (to / "export.json").read_text().replace('"hidden": 16', '"hidden": 32')
    )
    (tmp_path / "model.safetensors").write_bytes((to / "model.safetensors").read_bytes())
    with pytest.raises(DataError, match="do not match the task's model"):
        train.load(tmp_path, trust=True)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(DataError, match=r"model\.safetensors"):
        train.load(tmp_path, trust=True)


def test_load_imports_no_code_that_only_the_export_names(tmp_path, monkeypatch):
    import train
    from tests.support.tiny import TinyTask
    from train.config.load import load_config
    from train.exits import UsageError
    from train.export.module import export_parameters, write_description

    def describe(**changes):
        values = loaded.config.model_dump(mode="json")
        values["task"] |= changes
        write_description(tmp_path, values, {}, model)

    loaded = load_config([], TINY, runs=False)
    model = loaded.task(loaded.config).build_model()
    export_parameters(model, tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code_of_an_export.py").write_text(
        "from pathlib import Path\nfrom tests.support.tiny import TinyTask\nPath('ran').touch()\n"
    )
    path = sys.path[:]
    describe(use="code_of_an_export:TinyTask")
    with pytest.raises(UsageError, match=r"names the code .* trust=True .* task="):
        train.load(tmp_path)
    module = train.load(tmp_path, task=TinyTask)
    assert_same_bits(dict(model.state_dict()), dict(module.state_dict()))
    assert not (tmp_path / "ran").exists()
    train.load(tmp_path, trust=True)
    assert (tmp_path / "ran").exists()
    assert sys.path == path
    assert str(tmp_path) not in sys.path


def test_load_imports_no_loss_that_the_export_of_a_built_in_task_names(tmp_path):
    import train
    from train.exits import UsageError

    config = {"task": {"use": "digits", "loss": "code_of_others:loss"}, "run": {"seed": 0}}
    (tmp_path / "export.json").write_text(json.dumps({"task": "digits", "config": config}))
    with pytest.raises(UsageError, match=r"names the code 'code_of_others:loss' \(task.loss\)"):
        train.load(tmp_path)


@pytest.fixture
def export(tmp_path, capsys):
    """Exports a finished run in the process of the test; returns the exit code, the names of the
    files that it wrote, and its messages."""
    where = [*TINY, "length.steps=6", f"run.dir={tmp_path / 'run'}"]
    train.fit(*where, "track.console=quiet")
    to = tmp_path / "to"

    def command(*words):
        code = main(["export", *where, "--to", str(to), *words])
        return code, sorted(os.listdir(to)) if to.exists() else [], capsys.readouterr().err

    return command


def test_the_home_directory_and_an_override_without_effect(export, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    code, files, said = export("--to=~/here", "--form=parameters", "batch.global_batch_size=6")
    assert (code, files) == (0, [])
    assert (tmp_path / "here" / "model.safetensors").exists()
    assert "no effect on this command: batch.global_batch_size (6; the run has 12)." in said


def test_without_example_inputs_the_default_is_the_parameters(export, monkeypatch):
    monkeypatch.setattr(TinyTask, "example_inputs", Task.example_inputs)
    code, files, said = export("--form", "both")
    assert (code, files) == (64, [])
    assert "--form is both, but the task has no example_inputs()" in said
    code, files, said = export()
    assert (code, files) == (0, ["export.json", "model.safetensors"])
    assert "has no program, only the parameters" in said


def test_a_model_that_torch_export_refuses_is_one_sentence_and_leaves_nothing(export, monkeypatch):
    monkeypatch.setattr(TinyTask, "example_inputs", lambda self: ("no tensor", 3))
    code, files, said = export()
    assert (code, files) == (64, [])
    (line,) = said.splitlines()
    assert "torch.export cannot export the Sequential" in line
    assert line.endswith("or use --form parameters.")
    assert export("--form", "parameters")[0] == 0


@pytest.mark.parametrize("name", ["write_description", "export_program"])
def test_an_export_that_fails_leaves_what_was_there(export, monkeypatch, name):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"train.export.module.{name}", fail)
    code, files, said = export()
    assert (code, files) == (75, [])
    assert "No space left on device" in said
    monkeypatch.undo()
    assert export("--form=parameters")[:2] == (0, ["export.json", "model.safetensors"])
    monkeypatch.setattr(f"train.export.module.{name}", fail)
    assert export()[:2] == (75, ["export.json", "model.safetensors"])


@pytest.mark.process
@pytest.mark.parametrize("size", ["4k", "8k"])
def test_a_full_disk_leaves_no_export(tmp_path, capfd, size):
    """torch's writer of archives aborts the process; 8 kB hold the parameters."""
    from torch.export import export

    model = nn.Linear(32, 32)
    program = export(model, (torch.ones(2, 32),))
    exported = Exported(model, program, has_parameters=True)
    loaded = load_config([], TINY, runs=False)
    with small_disk(tmp_path / "disk", f"size={size}") as disk:
        with pytest.raises(OSError, match="No space left on device"):
            exported.write(disk / "to", loaded, Manifest(3, {}, {}, {}))
        assert os.listdir(disk) == []


@pytest.mark.parametrize("attribute", ["false", "true"])
def test_a_model_that_depends_on_the_data_is_evaluated_exported_and_loaded(tmp_path, attribute):
    task = ["task.use=tests.support.uneven:DataDependentTask", f"model.attribute={attribute}"]
    run("fit", tmp_path / "run", *task, "length.steps=2", "schedule.warmup_steps=0")
    run("evaluate", tmp_path / "run", *task)
    run("export", tmp_path / "run", *task, "--to", tmp_path / "export")
    assert train.load(tmp_path / "export", trust=True).weight.shape == (4, 8)


def test_a_model_that_needs_data_which_is_gone_is_one_sentence():
    class Gone(TinyTask):
        def build_model(self):
            return self.model

        def train_dataset(self):
            raise FileNotFoundError("data.bin")

    with pytest.raises(UsageError, match=r"build_model\(\) failed .*'model'.* failed .*data.bin"):
        build_full_model(Gone(tiny_config()), 0, {})


@pytest.mark.parametrize("size", [10**18, 2**62, 10**30])
@pytest.mark.parametrize("shapes", [None, {}])
def test_a_model_of_a_size_that_no_tensor_has_is_refused(size, shapes):
    class Large(TinyTask):
        def build_model(self):
            return nn.Embedding(size, 8)

    with pytest.raises(UsageError, match=r"Large needs a tensor that is too large.*section model"):
        build_full_model(Large(tiny_config()), 0, shapes)
