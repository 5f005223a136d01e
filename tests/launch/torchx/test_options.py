"""The values of ``-cfg``."""

import pytest
from torchx.specs import runopts

from launch.torchx.options import parse
from train.exits import UsageError


def options():
    known = runopts()
    known.add("job_dir", type_=str, default=None, help="a directory")
    known.add("partition", type_=str, default=None, help="a name")
    return known


def test_the_home_directory_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = parse("job_dir=~/jobs,partition=a~b", options(), "slurm")
    assert (found["job_dir"], found["partition"]) == ("/home/me/jobs", "a~b")
    with pytest.raises(UsageError, match=r"^-cfg job_dir is '~nobody_here/x', which cannot be"):
        parse("job_dir=~nobody_here/x", options(), "slurm")
