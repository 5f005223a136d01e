"""Help and errors on the command line, without heavy imports."""

import subprocess
import sys

import pytest

from tests.support.forked import command
from tests.support.lanes import slow
from tests.support.runs import ROOT, environment
from train.commands import COMMANDS

HEAVY = {"torch", "accelerate", "sklearn", "tensorboard", "wandb", "tokenizers", "safetensors"}


def light(*words, package="train", before=""):
    """Runs a command in a new interpreter that fails if something heavy was imported."""
    script = (
        f"import sys\n{before}\nfrom {package}.cli import main\n"
        "try: code = main(sys.argv[1:])\nexcept SystemExit as end: code = end.code\n"
        f"heavy = {HEAVY!r} & set(sys.modules)\nsys.exit(f'imported {{heavy}}' if heavy else code)"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_help_lists_every_command_and_imports_nothing_heavy():
    done = light("--help")
    assert done.returncode == 0, done.stderr
    for name, text in COMMANDS.items():
        assert f"    {name}" in done.stdout
        assert text.split(":", maxsplit=1)[0][:30] in done.stdout
    assert "python -m train COMMAND --help" in done.stdout


@pytest.mark.parametrize("package", ["train", "launch"])
def test_a_missing_dependency_is_one_sentence_with_the_remedy(package):
    done = light("fit", package=package, before="sys.modules['pydantic'] = None")
    assert done.returncode == 64
    (line,) = done.stderr.splitlines()
    assert line.startswith("isorun: error: The package 'pydantic' is not installed for ")
    assert "`pip install isorun`" in line


def test_usage_names_python_m_train():
    done = subprocess.run(
        [sys.executable, "-m", "train", "--help"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m train ")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fit", ["--config FILE", "key=value", "--allow-changes", "run it again"]),
        ("evaluate", ["--checkpoint WHICH", "--json", "newest, best"]),
        ("export", ["--to DIR", "--form", "train.load(path)"]),
        ("verify", ["used exactly once", "65"]),
        ("show-config", ["--plain"]),
        ("schema", ["yaml-language-server"]),
        ("new", ["NAME", "data, network, loss, metrics"]),
        ("runs", ["DIR or key=value", "--sort", "--state STATE", "KEY=VALUE"]),
        ("compare", ["RUN", "--tolerance REL"]),
        ("logs", ["--rank N", "--attempt K", "-f, --follow", "{DEBUG,INFO,"]),
    ],
)
def test_every_command_has_help(name, said):
    done = command(name, "--help")
    assert done.stdout.startswith(f"usage: python -m train {name} ")
    for text in said:
        assert text in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    "words",
    [
        ["show-config", "--config", "configs/text.yaml"],
        ["schema", "task.use=digits"],
        ["verify", "--config", "configs/text.yaml", "run.dir=/nowhere"],
        ["fit", "--config", "configs/text.yaml", "--no-such-flag"],
        ["runs", "tests/data"],
        ["compare", "tests/data/run-0.1.0/single", "tests/data/run-0.1.0/two-ranks"],
    ],
)
@pytest.mark.parametrize("package", ["train", slow("launch")])
def test_commands_that_only_read_import_nothing_heavy(package, words):
    done = light(*words, package=package)
    assert done.returncode in (0, 64), done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fti"], "'fti' is not a command; did you mean fit? The commands are fit, evaluate,"),
        (["shwo-config"], "did you mean show-config?"),
        (["frobnicate"], "'frobnicate' is not a command. The commands are fit, evaluate,"),
        ([], "the following arguments are required: COMMAND; see `python -m train --help`."),
        (["fit", "--alow-changes"], "'--alow-changes'; did you mean --allow-changes?"),
        (["fit", "--resume"], "nknown argument '--resume'; see `python -m train fit --help`."),
        (["evaluate", "--checkpoint"], "expected one argument; see `python -m train evaluate --help`."),
        (["export", "--form", "onnx"], "invalid choice: 'onnx'"),
        (["new"], "required: NAME; see `python -m train new --help`."),
        (["new", "a", "b"], "nknown argument 'b'"),
        (["fit", "lr"], "The argument 'lr' on the command line is not of the form key=value"),
        (["fit", "--config", "nowhere.yaml"], "no config file or run directory 'nowhere.yaml'"),
    ],
)  # fmt: skip
def test_a_usage_error_is_one_line_with_exit_code_64(words, expected):
    done = command(*words, expect=64)
    (line,) = done.stderr.splitlines()
    assert line.startswith("isorun: error: ")
    assert expected.lower() in line.lower()
    assert done.stdout == ""


def test_flags_and_overrides_are_accepted_in_any_order():
    plain = command("show-config", "--config", "configs/text.yaml", "optim.lr=1.5", "--plain")
    mixed = command("show-config", "optim.lr=1.5", "--plain", "--config", "configs/text.yaml")
    assert plain.stdout == mixed.stdout
    assert "lr: 1.5" in plain.stdout
