"""Without a library of an extra, one sentence names the extra to install, and the rest works."""

import sys
import tomllib

import pytest
import torch
from fsspec.registry import _registry

from tests.support.runs import ROOT, TINY
from train.command_line import exit_code_of
from train.exits import Exit, UsageError

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def without(monkeypatch):
    """Makes imports of the given libraries fail."""

    def hide(*libraries):
        for name in list(sys.modules):
            if name.partition(".")[0] in libraries:
                monkeypatch.delitem(sys.modules, name)
        for name in libraries:
            monkeypatch.setitem(sys.modules, name, None)

    return hide


def digits(tmp_path):
    from train.tasks.digits.data import load_digits_split

    load_digits_split(0.2, 0, False)


def bpe(tmp_path):
    from train.tasks.text.text_config import Data
    from train.tasks.text.tokenizer import make_tokenizer

    make_tokenizer(Data(tokenizer="gpt.json"))


def parity(tmp_path):
    from train.cli import main

    code = main(["parity", *TINY, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists(), "a run was started"
    return code


def zero(tmp_path):
    from train.strategies.deepspeed_import import import_deepspeed

    import_deepspeed(torch.device("cpu"))


def component(tmp_path):
    from launch.cli import main

    return main(["render", "isorun.fit", "-j", "1x1"])


def tune(tmp_path):
    from launch.cli import main

    return main(["tune", "--show", str(tmp_path)])


def mirror(tmp_path):
    from train.checkpoint.checkpoint_config import MirrorConfig
    from train.checkpoint.mirror import Mirror

    # fsspec caches the classes that it has imported, for example in another test.
    for name in ("s3", "s3a"):
        _registry.pop(name, None)
    Mirror(MirrorConfig(url="s3://bucket/folder"))


@pytest.mark.parametrize(
    ("use", "library", "extra", "sentence"),
    [
        (digits, "sklearn", "digits", "task.use=digits needs scikit-learn, which cannot be imported"),
        (bpe, "tokenizers", "tokenizers", "data.tokenizer=gpt.json needs tokenizers, which"),
        (parity, "matplotlib", "plot", "parity needs matplotlib, which cannot be imported"),
        (zero, "deepspeed", "deepspeed", "A ZeRO strategy needs deepspeed, which cannot be imported"),
        (tune, "optuna", "tune", "tune needs optuna, which cannot be imported"),
        (component, "torchx", "launch", "render isorun.fit needs torchx, which cannot be imported"),
        (mirror, "s3fs", "s3", "checkpoint.mirror.url is 's3://bucket/folder', which cannot be used"),
    ],
)  # fmt: skip
def test_the_error_names_the_extra(without, tmp_path, capsys, use, library, extra, sentence):
    without(library)
    assert exit_code_of(lambda: use(tmp_path) or Exit.DONE) == Exit.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"isorun: error: {sentence}")
    assert f"`pip install 'isorun[{extra}]'`" in line
    assert extra in PROJECT["optional-dependencies"]


def test_the_error_says_what_works_without_it(without):
    without("tokenizers", "deepspeed")
    with pytest.raises(UsageError, match="or use bytes"):
        bpe(None)
    with pytest.raises(UsageError, match="or use strategy=fsdp2"):
        zero(None)


def test_the_core_needs_no_extra(without):
    from train.config.load import load_config

    without("sklearn", "matplotlib", "tokenizers", "deepspeed", "torchx", "kubernetes", "s3fs")
    loaded = load_config(["configs/text.yaml"], ["data.files=[docs/*.md]"], runs=False)
    task = loaded.task(loaded.config)
    assert len(task.train_dataset()) > 0
    assert task.build_model() is not None


def test_all_has_every_extra_for_users():
    extras = PROJECT["optional-dependencies"]
    (line,) = extras["all"]
    named = set(line.removeprefix("isorun[").removesuffix("]").split(","))
    assert named == extras.keys() - {"all", "bench", "dev"}


def test_the_install_page_names_every_extra():
    text = (ROOT / "docs/install.md").read_text()
    assert [name for name in PROJECT["optional-dependencies"] if f"| `{name}` |" not in text] == []
