"""Caches that hold code are in directories that no other user can write to."""

import os
import stat
from types import SimpleNamespace

import pytest

from tests.support.runs import TINY
from train.exits import UsageError
from train.private_directory import private_directory, use_private_caches

NAMES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")})
    for name in (*NAMES, "QUACK_CACHE_DIR"):
        os.environ.pop(name, None)
    before = os.umask(0)
    yield tmp_path / "cache"
    os.umask(before)


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_the_caches_are_below_the_cache_home_and_private(home):
    use_private_caches()
    for name in NAMES:
        assert os.environ[name].startswith(f"{home}/isorun/")
        assert mode(os.environ[name]) == 0o700
    assert mode(home / "isorun") == 0o700


def test_a_cache_that_others_could_write_to_becomes_private(home):
    (home / "isorun" / "torchinductor").mkdir(parents=True)
    use_private_caches()
    assert mode(home / "isorun") == mode(home / "isorun" / "torchinductor") == 0o700


def test_variables_that_are_set_stay(home):
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = "/somewhere"
    use_private_caches()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/somewhere"
    assert os.environ["TRITON_CACHE_DIR"].startswith(str(home))


def test_a_cache_of_another_user_is_not_used(home, monkeypatch):
    (home / "isorun").mkdir(parents=True)
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    with pytest.raises(UsageError, match="is not a directory of this user"):
        private_directory(home / "isorun")
    use_private_caches()
    assert not os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(home))
    assert mode(os.path.dirname(os.environ["TORCHINDUCTOR_CACHE_DIR"])) == 0o700


def test_only_a_link_of_this_user_is_followed(tmp_path, monkeypatch):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    private_directory(tmp_path / "link")
    assert mode(tmp_path / "target") == 0o700
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    with pytest.raises(UsageError):
        private_directory(tmp_path / "link")


def test_a_file_in_its_place_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError):
        private_directory(tmp_path / "file")


def test_without_a_cache_home_the_caches_are_temporary_and_private():
    os.environ["XDG_CACHE_HOME"] = "/proc/none"
    use_private_caches()
    for name in NAMES:
        assert mode(os.path.dirname(os.environ[name])) == 0o700
        assert not os.environ[name].startswith("/proc")


def test_torch_compiles_into_the_private_cache():
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    use_private_caches()
    assert cache_dir() == os.environ["TORCHINDUCTOR_CACHE_DIR"]


def test_an_attempt_uses_them(home, monkeypatch):
    from train.config.load import load_config
    from train.setup import build

    choice = SimpleNamespace(
        name="single", options=None, cls=SimpleNamespace(kwargs_handlers=lambda options: [])
    )
    monkeypatch.setattr(build, "Engine", lambda *_, **__: None)
    build.build_engine(load_config([], TINY, runs=False).config, choice)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(home))
