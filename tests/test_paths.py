"""``~`` in paths that a shell leaves as they are."""

import argparse

import pytest

from train.exits import UsageError
from train.paths import path_argument, user_path


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")


@pytest.mark.parametrize(
    ("text", "found"),
    [("~", "/home/me"), ("~/a b", "/home/me/a b"), ("a/~", "a/~"), ("./~/x", "~/x")],
)
def test_home(text, found):
    assert str(path_argument(text)) == found


def test_what_is_no_path():
    with pytest.raises(argparse.ArgumentTypeError, match="must not be empty"):
        path_argument("")
    with pytest.raises(argparse.ArgumentTypeError, match="no home directory for ~nobody_here"):
        path_argument("~nobody_here/x")
    with pytest.raises(UsageError, match="^data is x, which cannot be expanded: there is no home"):
        user_path("~nobody_here/x", "data is x")
