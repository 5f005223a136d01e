"""Stands for ``python -m train fit`` in tests of what tune makes of its ends: the same command line,
signals, lock, files and exit codes, in hundredths of a second. Needs the standard library only.

The loss falls with the steps, to a value that grows with the distance of optim.lr from 0.3.
data.split_seed selects how the run ends.
"""

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

STEPS = 6
ENDS = {65: "data", 70: "bug", 71: "memory", 64: "usage", 78: "diverged", 76: "refused"}
RETRY_ONCE, ALWAYS_KILLED = 75, 137
stopped = []


def main(words):
    values = dict(word.split("=", 1) for word in words if "=" in word)
    directory, end = Path(values["run.dir"]), int(values.get("data.split_seed", 0))
    directory.mkdir(exist_ok=True)
    lock = (directory / "lock").open("a")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (directory / "starts").open("a") as file:
        file.write(f"{os.getpid()}\n")
    wandb = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    (directory / "wandb.json").write_text(json.dumps(wandb))
    starts = len((directory / "starts").read_text().split())
    if (directory / "finished.json").exists():
        return 0
    (directory / "run.json").write_text("{}")
    (directory / "config.json").write_text(json.dumps({"length": {"steps": STEPS}}))
    state = directory / "state"
    first = int(state.read_text()) if state.exists() else 0
    distance = abs(float(values["optim.lr"]) - 0.3)
    with (directory / "metrics.jsonl").open("a") as metrics:
        for step in range(first + 1, STEPS + 1):
            time.sleep(float(os.environ.get("SHORT_FIT_STEP", "0.01")))
            if stopped:
                return 143
            if step == 3 and end in ENDS:
                print(f"isorun: error: the reason is {ENDS[end]}.", file=sys.stderr)
                return end
            if step == 3 and end == ALWAYS_KILLED:
                os.kill(os.getpid(), signal.SIGKILL)
            if step == 3 and end == RETRY_ONCE and starts == 1:
                return 75
            if step % 2 == 0:
                loss = distance + 1 / step
                row = {"step": step, "eval/loss": loss, "eval/accuracy": 1 - distance}
                metrics.write(json.dumps(row) + "\n")
                metrics.flush()
            state.write_text(str(step))
    end = {"step": STEPS, "metrics": {"loss": distance + 1 / STEPS, "accuracy": 1 - distance}}
    (directory / "finished.json").write_text(json.dumps(end))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    sys.exit(main(sys.argv[1:]))
