"""Cores and threads, by the limits of cgroups."""

import os

import pytest
import torch

from tests.support import strategies
from train.process import cores
from train.process.cores import threads_per_process, usable_cores


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


def cgroups(root, version, quotas):
    """Cgroups below each other: {path: quota in cores}; returns the file that names the lowest one
    as that of this process."""
    for path, quota in quotas.items():
        place = root / ("cpu" if version == 1 else "") / path
        place.mkdir(parents=True, exist_ok=True)
        if version == 2:
            (place / "cpu.max").write_text(f"{int(quota * 1e5) if quota else 'max'} 100000\n")
        else:
            (place / "cpu.cfs_quota_us").write_text(f"{int(quota * 5e4) if quota else -1}\n")
            (place / "cpu.cfs_period_us").write_text("50000\n")
    own, lowest = root / "self", list(quotas)[-1]
    own.write_text(f"7:memory:/\n4:cpu,cpuacct:/{lowest}\n" if version == 1 else f"0::/{lowest}\n")
    return own


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ({".": 2.5}, 2.5),  # a container: its own cgroup is the root
        ({".": None}, 8.0),
        ({".": 16}, 8.0),
        ({"pod": 3, "pod/container": 4}, 3.0),
        ({"job": None, "job/step": 0.5, "job/step/task": None}, 0.5),
    ],
)
def test_the_lowest_quota_counts(tmp_path, version, quotas, expected):
    own = cgroups(tmp_path, version, quotas)
    assert usable_cores(tmp_path, own) == expected


def test_a_cgroup_of_the_host_that_a_container_does_not_see(tmp_path):
    cgroups(tmp_path, 1, {".": 2, "kubepods": 1, "pod1": 1})
    for path in ("/kubepods/../pod1", "/../kubepods", "/other"):
        (tmp_path / "self").write_text(f"4:cpu:{path}\n")
        assert usable_cores(tmp_path, tmp_path / "self") == 2.0


def test_a_directory_that_is_named_after_all_its_controllers(tmp_path):
    own = cgroups(tmp_path, 1, {".": None, "job": 3})
    (tmp_path / "cpu").rename(tmp_path / "cpu,cpuacct")
    assert usable_cores(tmp_path, own) == 3.0


@pytest.mark.parametrize("text", ["", "max", "1e5 100000", "100000 0 0"])
def test_a_quota_that_cannot_be_read_is_none(tmp_path, text):
    (tmp_path / "cpu.max").write_text(text)
    assert usable_cores(tmp_path, tmp_path / "none") == 8.0


def test_processes_share_the_cores(monkeypatch):
    for there, processes, threads in ((8.0, 2, 4), (3.5, 2, 1), (0.5, 1, 1), (96.0, 8, 12)):
        monkeypatch.setattr(cores, "usable_cores", lambda there=there: there)
        assert threads_per_process(processes) == threads
    assert threads_per_process(2, 5.0) == 2


@pytest.mark.parametrize(("variable", "threads"), [(None, 1), (" ", 1), ("2", 2)])
def test_a_single_process_has_no_more_threads_than_its_quota(monkeypatch, variable, threads):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(cores, "usable_cores", lambda: 1.5)
    try:
        torch.set_num_threads(2)
        strategies.engine()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
