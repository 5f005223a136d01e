"""What torch.compile needs of a machine is missed before the first step."""

import os
from types import SimpleNamespace

import pytest

from tests.support.ranks import on_ranks
from train.exits import UsageError
from train.setup import compiler


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine with compilers and headers, in an environment without choices."""
    for name in ("CC", "CXX", "TORCH_INDUCTOR_INSTALL_GXX", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "not/made/yet"))
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("g++", "gcc"):
        (programs / name).touch(0o755)
    monkeypatch.setenv("PATH", str(programs))
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    return tmp_path


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_machine_with_all_of_it(device):
    assert compiler.lacking(device) is None


@pytest.mark.parametrize(
    ("device", "removed", "environ", "lack"),
    [
        ("cpu", "bin/g++", {}, "has no C++ compiler (g++); install one"),
        ("cpu", None, {"CXX": "clang++"}, "has no C++ compiler (clang++)"),
        ("cpu", "bin/gcc", {}, None),
        ("cpu", "bin/g++", {"TORCH_INDUCTOR_INSTALL_GXX": "1"}, None),
        ("cuda", "bin/gcc", {}, "has no C compiler (gcc or clang); install one"),
        ("cuda", None, {"CC": "icx"}, "has no C compiler (icx)"),
        ("cuda", "bin/g++", {}, None),
        ("cpu", "Python.h", {}, "/Python.h; install Python's headers"),
    ],
)
def test_what_is_missing_is_named(machine, monkeypatch, device, removed, environ, lack):
    if removed:
        (machine / removed).unlink()
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    found = compiler.lacking(device)
    assert found is None if lack is None else lack in found


@pytest.mark.parametrize(
    ("device", "noexec", "found"),
    [
        ("cpu", "a", "run code from {}/a"), ("cuda", "b", "run code from {}/b"), ("cpu", "b", None)
    ],
)  # fmt: skip
def test_a_cache_from_which_no_code_may_run(machine, monkeypatch, device, noexec, found):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(machine / "a"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(machine / "b"))
    for name in ("a", "b"):
        (machine / name).mkdir()
    flags = {str(machine / noexec): os.ST_NOEXEC}
    monkeypatch.setattr("os.statvfs", lambda path: SimpleNamespace(f_flag=flags.get(str(path), 0)))
    lack = compiler.lacking(device)
    assert lack is None if found is None else found.format(machine) in lack


def test_all_ranks_are_refused_if_one_cannot_compile(monkeypatch):
    lacks = {0: None, 1: "has no C++ compiler (g++)"}
    monkeypatch.setattr(compiler, "lacking", lambda _: lacks[rank.pop(0)])
    rank = [0, 1]
    errors = on_ranks(2, lambda ranks: compiler.check_compiler(ranks, "cpu", "command line"))
    for error in errors:
        with pytest.raises(UsageError, match=r"compile is true \(command line\), but .* has no C"):
            raise error
