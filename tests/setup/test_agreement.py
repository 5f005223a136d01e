"""Ranks that do not belong to the same run are refused before the run directory changes."""

import pytest

from tests.support.forked import run_ranks, start_ranks
from tests.support.runs import ROOT


@pytest.mark.parametrize("count", [2, 3])
def test_a_different_config_on_one_rank(tmp_path, count):
    ranks = start_ranks(count, "fit", tmp_path, own={1: ["optim.lr=0.5"]})
    for done in [rank.wait() for rank in ranks]:
        assert done.returncode == 64
        assert "The ranks are not in the same run: optim.lr is 0.5 on rank 1 (" in done.stderr
        assert "but 0.01 on the others" in done.stderr
    assert not (tmp_path / "ledger.bin").exists()


@pytest.mark.slow
def test_a_run_directory_that_is_not_shared(tmp_path):
    """The path is relative to different working directories, as on hosts without a shared file
    system."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "tests").symlink_to(ROOT / "tests")
    ranks = start_ranks(2, "fit", "here", cwds=[tmp_path / "0", tmp_path / "1"])
    for done in [rank.wait() for rank in ranks]:
        assert done.returncode == 64, done.stderr
        assert "The run directory here of rank 0" in done.stderr
        assert "is not visible to rank 1 (" in done.stderr
    assert not (tmp_path / "1/here/ledger.bin").exists()


def test_no_token_file_remains(tmp_path):
    run_ranks(2, "fit", tmp_path, "length.steps=6")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".seen")]
