"""Run directories with the files of a run that never ran."""

import math

from tests.support.run_files import write, write_files

START = 1_767_225_600.0  # seconds since the epoch


def write_run(directory, name="shown", *, steps=400, every=2, lr=3e-3, task="text", **config):
    """A run of three attempts: killed after step 100, stopped at step 260, finished."""
    run_id = f"{name}-20260101-000000-abcdef"
    identity = {"id": run_id, "name": name, "wandb_id": "w", "created": START}
    values = {
        "task": {"use": task}, "run": {"name": name}, "length": {"steps": steps},
        "optim": {"lr": lr, "betas": [0.9, 0.95]}, **config,
    }  # fmt: skip
    shared = {
        "run": run_id, "seed": 0, "samples": 3287, "batch": 16,
        "world_size": 2, "hosts": ["node-a"], "strategy": "ddp", "micro_batch_size": 8,
        "device": "cpu", "code": {"isorun": "0.2.0", "commit": "c0ffee"}, "changes": [],
    }  # fmt: skip
    attempts = [
        {"attempt": 1, "time": START, "resumed_from_step": None},
        {"attempt": 2, "time": START + 150, "resumed_from_step": 100,
         "ended": {"time": START + 330, "code": 143, "reason": "the run stopped on request"}},
        {"attempt": 3, "time": START + 400, "resumed_from_step": 260,
         "ended": {"time": START + 600, "code": 0, "reason": "the run is finished"}},
    ]  # fmt: skip
    rows = []
    for step in [1, *range(every, steps + 1, every)]:
        number = 1 if step <= 100 else 2 if step <= 260 else 3
        before = (0, 100, 260)[number - 1]
        row = {
            "step": step, "attempt": number,
            "time": attempts[number - 1]["time"] + 5 + step - before,
            "train/loss": None if step == 180 else 1 + 2 * math.exp(-step * lr * 10),
            "train/learning_rate": lr * min(1, step / 30), "train/gradient_norm": 1 + 3 / step,
            "train/epoch": step / 200, "train/skipped_steps": int(step >= 180),
            "speed/samples_per_second": 180.0 + step % 7, "time/step": 0.09, "time/data": 0.01,
            "memory/rss_gib": 1.5,
        }  # fmt: skip
        if step % 50 == 0:
            row |= {"eval/loss": 1.2 + 2 * math.exp(-step / 99), "eval/accuracy": step / 500}
        rows.append(row)
    lines = [shared | attempt for attempt in attempts]
    finished = {"step": steps, "metrics": {"loss": 1.3}}
    return write_files(directory, identity, values, lines, rows, finished)


def write_samples(directory, step, *items):
    """The samples of a step; an item is a JSON object with ``name``."""
    (directory / "samples").mkdir(exist_ok=True)
    path = directory / "samples" / f"step-{step:012d}.json"
    write(path, {"step": step, "attempt": 1, "time": START, "items": items, "left_out": 0})
