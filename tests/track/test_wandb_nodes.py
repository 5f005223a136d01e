"""``track.wandb_nodes``: each node sends its system metrics to the one W&B run."""

import re
import subprocess
import sys
import tempfile

import pytest

pytest.importorskip("wandb")

from tests.support.forked import quick
from tests.support.runs import ROOT, metrics
from tests.support.wandb_server import WandbServer
from train.distributed.world import World
from train.track.wandb_nodes import stands_for_its_node

RANK = """
import sys, time
from pathlib import Path
from train.track.logs import setup_logging
from train.track.track_config import TrackConfig
from train.track.tracker import Tracker
from train.track.wandb_nodes import NodeMetrics
from tests.track.conftest import run_info

directory, rank, attempt, start, end = Path(sys.argv[1]), *map(int, sys.argv[2:6])
seconds, mode = float(sys.argv[6]), sys.argv[7]
info = run_info(directory, attempt=attempt, start_step=start)
config = TrackConfig(console="plain", tensorboard=False, wandb=mode, wandb_nodes=True)
setup_logging(directory, rank, attempt, "INFO")
node = NodeMetrics(info, config, rank, close_seconds=seconds) if rank else None
tracker = Tracker(config, info, is_main=rank == 0, node=node, close_seconds=seconds)
for step in range(start + 1, end + 1):
    tracker.progress(step)
    tracker.log(step, {"train/loss": 1.0 / step})
    tracker.flush(step)
time.sleep(2)
tracker.close()
"""


def attempt(directory, server, number, start, end, *, seconds=60.0, mode="auto"):
    """Two ranks, as if each were on a node of its own; returns what both print."""
    started = []
    for rank in (0, 1):
        words = [directory, rank, number, start, end, seconds, mode]
        program = quick([sys.executable, "-c", RANK, *map(str, words)])
        clean = {k: v for k, v in program["env"].items() if "WANDB" not in k}
        clean |= {"HOME": str(directory), "WANDB_DIR": str(directory), **server.environment}
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        started.append((output, subprocess.Popen(
            program["args"], cwd=ROOT, env=clean, stdout=output, stderr=subprocess.STDOUT,
        )))  # fmt: skip
    texts = []
    for output, process in started:
        assert process.wait(120) == 0
        output.seek(0)
        texts.append(output.read())
        output.close()
    return texts


@pytest.fixture(scope="module")
def two_attempts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    with WandbServer() as server:
        attempt(directory, server, 1, 0, 12)
        attempt(directory, server, 2, 10, 20)
        yield directory, server.runs["digits-wandb-id"]


@pytest.mark.slow
def test_both_nodes_send_their_system_metrics(two_attempts):
    _, run = two_attempts
    names = {name for line in run.system_metrics for name in line if name.startswith("system.")}
    labels = {re.search(r"-rank-\d+", name)[0] for name in names}
    assert labels == {"-rank-0", "-rank-1"}


@pytest.mark.slow
def test_steps_are_told_once_and_by_rank_0_only(two_attempts):
    _, run = two_attempts
    assert run.steps == list(range(1, 21))
    assert run.exit_codes == [0, 0], "only rank 0 ends the run, once per attempt"


@pytest.mark.slow
def test_files_of_other_nodes_are_no_attempts(two_attempts):
    from train.track.wandb_log import transaction_logs

    directory, _ = two_attempts
    assert len(transaction_logs(directory)) == 2
    assert (directory / "wandb/nodes").is_dir()
    assert "WARNING" not in (directory / "logs/rank-1.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("fault", [500, "hang", "close"])
def test_a_faulty_server_neither_stops_nor_holds_the_ranks(tmp_path, fault):
    with WandbServer() as server:
        server.fault = lambda operation: fault
        attempt(tmp_path, server, 1, 0, 5, seconds=2.0)
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, 6))
    warnings = (tmp_path / "logs/rank-1.log").read_text().count("WARNING")
    assert warnings == 1


@pytest.mark.slow
def test_offline_it_has_no_effect_and_says_so(tmp_path):
    with WandbServer() as server:
        said, _ = attempt(tmp_path, server, 1, 0, 5, mode="offline")
        assert server.operations == []
    assert said.count("track.wandb_nodes has no effect offline.") == 1
    (line,) = [x for x in (tmp_path / "logs/rank-1.log").read_text().splitlines() if "WARN" in x]
    assert "offline, W&B has the system metrics of the first node only" in line


def test_one_rank_per_node_stands_for_it():
    hosts = ["a", "a", "b", "b", "c"]

    def senders(local_ranks, guessed=False):
        worlds = [
            World(rank, 5, local, 2, "torchrun", hosts[rank], local_rank_guessed=guessed)
            for rank, local in enumerate(local_ranks)
        ]
        return [world.rank for world in worlds if stands_for_its_node(world, hosts)]

    assert senders([0, 1, 0, 1, 0]) == [2, 4]
    assert senders([0, 0, 0, 0, 0], guessed=True) == [2, 4]
    # Two nodes of an agent on one machine.
    assert senders([0, 0, 0, 1, 0]) == [1, 2, 4]
