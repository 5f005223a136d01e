"""Starts runs from the command line and reads their run directories."""

import fcntl
import json
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import torch

from train.config.load import load_config
from train.distributed.shard import Shard

ROOT = Path(__file__).parents[2]
_PORTS = range(12_000, 32_000)
TINY = [
    "task.use=tests.support.tiny:TinyTask",
    "batch.global_batch_size=12",
    "length.steps=40",
    "optim.lr=0.01",
    "optim.clip_norm=1.0",
    "schedule.use=cosine",
    "schedule.warmup_steps=5",
    "track.tensorboard=false",
    "track.wandb=disabled",
    "track.log_every_steps=1",
]


def command(name, directory, *overrides, processes=None, base=TINY):
    """The command line of a run in a directory; with ``processes``, through torchrun."""
    arguments = [name, *base, f"run.dir={directory}", *overrides]
    if processes is None:
        return [sys.executable, "-m", "train", *arguments]
    return [
        sys.executable, "-m", "torch.distributed.run",
        "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1",
        "--master-port", str(free_port()), "-m", "train", *arguments,
    ]  # fmt: skip


def tiny_config(*overrides):
    """The config of the tiny task, as loaded for a run."""
    return load_config([], [*TINY, *overrides], runs=False).config


def start(*args, **kwargs):
    """Starts a run in the background."""
    return subprocess.Popen(
        command(*args, **kwargs), cwd=ROOT, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(*args, expect=0, env=None, **kwargs):
    """Runs a run to its end, with further variables ``env``; checks its exit code, unless
    ``expect`` is None."""
    done = subprocess.run(
        command(*args, **kwargs), cwd=ROOT, env=environment() | (env or {}),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert expect in (None, done.returncode), (
        f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    return done


def environment():
    """This process's environment with one thread, so that results are bitwise equal everywhere."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def free_port():
    """A port that no process listens at, and that no other test gets, in whatever process, before
    all of ``_PORTS`` have had their turn. The system gives none of them to a client, nor to a
    server that asks for any port: with one of its own, a node of one test once joined another's.
    """
    with (Path(tempfile.gettempdir()) / f"isorun-tests-port-{os.getuid()}").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        last = int(file.read() or _PORTS[0])
        for port in (*range(last + 1, _PORTS.stop), *range(_PORTS.start, last + 1)):
            with socket.socket() as s, suppress(OSError):
                s.bind(("", port))
                file.truncate(0)
                file.write(str(port))
                return port
    raise OSError(f"every port of {_PORTS} is taken")


def is_running(pid):
    """Whether there is such a process, and it has not ended."""
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def checkpoints(directory):
    """The steps of the committed checkpoints."""
    from train.checkpoint.store import CheckpointStore

    return CheckpointStore(Path(directory) / "checkpoints").steps()


def tensors(directory, step=None):
    """All tensors of a checkpoint, by default the newest."""
    from train.checkpoint import dcp
    from train.checkpoint.store import CheckpointStore

    store = CheckpointStore(Path(directory) / "checkpoints")
    path = store.path(step or store.steps()[-1])
    found = {n: torch.empty(shape, dtype=dtype) for n, (shape, dtype) in dcp.shapes(path).items()}
    dcp.load({name: Shard.of(tensor) for name, tensor in found.items()}, path, None)
    return found


def state(directory, step=None):
    """The loop's state in a checkpoint."""
    from train.checkpoint.manifest import Manifest
    from train.checkpoint.store import CheckpointStore

    store = CheckpointStore(Path(directory) / "checkpoints")
    return Manifest.read(store.path(step or store.steps()[-1])).state


def metrics(directory):
    """The rows of metrics.jsonl; a line that is still being written does not count."""
    lines = (Path(directory) / "metrics.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def curve(directory, key="train/loss"):
    """Maps steps to the values of one metric."""
    return {row["step"]: row[key] for row in metrics(directory) if key in row}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
