"""Writes the files of a run directory, without a run."""

import functools
import json
import os
import socket
import time

from tests.support.runs import tiny_config


@functools.cache
def config_text(overrides):
    """The config of the tiny task as JSON."""
    return tiny_config(*overrides).model_dump_json()


def make_run(
    path,
    *overrides,
    attempts=({},),
    rows=(),
    finished=None,
    lock=None,
    checkpoint=None,
    name=None,
):
    """A run directory of the tiny task. ``attempts``: what each line of attempts.jsonl has besides
    the usual fields. ``rows``: rows of metrics.jsonl, or the losses of the training by step.
    ``lock``: host and process that hold it. ``checkpoint``: the state in a checkpoint."""
    name = name or path.name
    identity = {"id": f"{name}-id", "name": name, "wandb_id": f"{name}-id", "created": 1e9}
    config = json.loads(config_text(overrides))
    config["run"]["name"] = name
    usual = {
        "run": f"{name}-id", "seed": 0, "samples": 103, "batch": 12, "time": 1e9 + 1,
        "resumed_from_step": None, "world_size": 1, "hosts": ["node-0"], "strategy": "single",
        "micro_batch_size": 12, "device": "cpu", "changes": [],
        "code": {"isorun": "0.2.0", "commit": "abc", "dirty": False},
    }  # fmt: skip
    lines = [{"attempt": n, **usual, **more} for n, more in enumerate(attempts, 1)]
    if isinstance(rows, dict):
        rows = [{"step": step, "train/loss": loss} for step, loss in rows.items()]
    whole = [{"attempt": 1, "time": 1e9 + 2 + row["step"], **row} for row in rows]
    end = None if finished is None else {"step": finished, "metrics": {}}
    write_files(path, identity, config, lines, whole, end)
    if lock is not None:
        host, pid = lock
        (path / "lock").write_text(f"process {pid} on {host} since 2026-11-26 10:00:00")
    if checkpoint is not None:
        write_checkpoint(path, checkpoint)
    return path


def write_files(path, identity, config, attempts, rows, finished=None):
    """The files of a run directory, of which empty ones are left out."""
    path.mkdir(parents=True, exist_ok=True)
    write(path / "run.json", identity)
    write(path / "config.json", config)
    for name, lines in (("attempts.jsonl", attempts), ("metrics.jsonl", rows)):
        if lines:
            write_lines(path / name, lines)
    if finished is not None:
        write(path / "finished.json", finished)
    return path


def write(path, values):
    """A JSON file."""
    path.write_text(json.dumps(values))


def write_lines(path, rows):
    """A file with a JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_checkpoint(path, state, step=10):
    """The manifest of a checkpoint without tensors."""
    from train.checkpoint.layout import step_name
    from train.checkpoint.manifest import MANIFEST, Manifest

    folder = path / "checkpoints" / step_name(step)
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(Manifest(step, state, None, {}).to_json())


def beat(path, rank, age):
    """The heartbeat of a rank, ``age`` seconds old."""
    (path / "heartbeats").mkdir(exist_ok=True)
    file = path / "heartbeats" / f"rank-{rank}.json"
    file.write_text("{}")
    made = time.time() - age
    os.utime(file, (made, made))


def here():
    """Host and process of this process, as the holder of a lock."""
    return socket.gethostname(), os.getpid()
