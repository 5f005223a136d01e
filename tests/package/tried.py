"""Tests that ``.ci/versions`` runs with the lowest and the newest dependencies, besides others.

pytest does not collect this file by default: with the pinned versions, other tests cover it.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from tests.package.test_versions import EXTRAS, bounds, requirements
from tests.support.forked import run, run_ranks
from tests.support.runs import ROOT, TINY, environment, tensors
from train.data.ledger import read_steps
from train.parity.compare import curve, largest_difference, plot

LOWEST = os.environ["ISORUN_TESTS_VERSIONS"] == "lowest"
RUN = ["batch.micro_batch_size=3", "length.steps=12", "checkpoint.every_steps=6", "ema.decay=0.9"]


@pytest.mark.parametrize("extra", sorted(EXTRAS.keys() - {"bench"}))
def test_the_installed_versions_are_the_requested_ones(extra):
    """If another dependency requires a newer version, the lower bound was not tested."""
    for requirement in requirements(extra):
        installed = Version(version(requirement.name))
        assert requirement.specifier.contains(installed.base_version), requirement
        if LOWEST:
            expected = Version(bounds(requirement)[">="])
            assert Version(installed.base_version) == expected, requirement


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    run("fit", directory, *RUN)
    return directory


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero3"])
def test_two_ranks_give_the_result_of_one_process(alone, tmp_path, strategy):
    run_ranks(2, "fit", tmp_path, *RUN, f"strategy={strategy}")
    assert read_steps(tmp_path / "ledger.bin") == read_steps(alone / "ledger.bin")
    for key in ("train/loss", "train/gradient_norm"):
        assert largest_difference(curve(alone, key), curve(tmp_path, key)) <= 1e-5
    assert tensors(tmp_path).keys() == tensors(alone).keys()
    plot({"1": alone, strategy: tmp_path}, tmp_path / "curves.png", "curves")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_torchx_starts_two_ranks(tmp_path):
    torchx = Path(sys.executable).with_name("torchx")
    done = subprocess.run(
        [torchx, "run", "-s", "local_cwd", "isorun.fit", "-j", "1x2", "--preflight", "off", *TINY,
         f"run.dir={tmp_path / 'run'}", "length.steps=6"],
        cwd=ROOT, env={**environment(), "XDG_STATE_HOME": str(tmp_path), "PATH": os.defpath},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run/finished.json").read_text())["step"] == 6


def test_a_run_is_tracked_offline_and_exported(tmp_path):
    tracked = [*RUN, "track.wandb=offline", "track.tensorboard=true", "evaluate.every_steps=6"]
    run("fit", tmp_path, *tracked)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert list(tmp_path.glob("tensorboard/events.*"))
    run("export", tmp_path, *tracked)
    assert list(tmp_path.glob("exports/*/*.safetensors"))


def test_google_storage_is_found():
    """Only that the library loads: the tests have no such server."""
    import fsspec

    system, path = fsspec.core.url_to_fs("gs://bucket/folder", token="anon")
    assert path == "bucket/folder"
    assert type(system).__module__.startswith("gcsfs")
