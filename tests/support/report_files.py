"""Run directories with the files of a run that never ran."""

import json
import math

START = 1_767_225_600.0  # seconds since the epoch


def write_run(directory, name="shown", *, steps=400, every=2, lr=3e-3, task="text", **config):
    """A run of three attempts: killed after step 100, stopped at step 260, finished."""
    directory.mkdir(parents=True, exist_ok=True)
    write(directory / "run.json", {
        "id": f"{name}-20260101-000000-abcdef", "name": name, "wandb_id": "w", "created": START,
    })  # fmt: skip
    write(directory / "config.json", {
        "task": {"use": task}, "run": {"name": name}, "length": {"steps": steps},
        "optim": {"lr": lr, "betas": [0.9, 0.95]}, **config,
    })  # fmt: skip
    shared = {
        "run": f"{name}-20260101-000000-abcdef", "seed": 0, "samples": 3287, "batch": 16,
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
    write_lines(directory / "attempts.jsonl", [shared | attempt for attempt in attempts])
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
    write_lines(directory / "metrics.jsonl", rows)
    write(directory / "finished.json", {"step": steps, "metrics": {"loss": 1.3}})
    return directory


def write_samples(directory, step, *items):
    """The samples of a step; an item is a JSON object with ``name``."""
    (directory / "samples").mkdir(exist_ok=True)
    path = directory / "samples" / f"step-{step:012d}.json"
    write(path, {"step": step, "attempt": 1, "time": START, "items": items, "left_out": 0})


def write(path, values):
    path.write_text(json.dumps(values))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
