"""Time from the command to the end of the first step: isorun compared with a bare script.

Both are separate processes, started in turns. The script imports torch, builds the same model on
the same text, runs one step of the same optimiser and ends. isorun reads the config, opens a run
directory, tries the evaluation and runs one step; the second row includes everything at the end of
a run except an evaluation.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.timing import ENVIRONMENT, machine, median_and_spread, ratios, table

_RUN = [
    "fit", "--config", "configs/text.yaml", "length.steps=1", "schedule.warmup_steps=0",
    "evaluate.at_end=false", "evaluate.every_steps=1000", "track.console=plain",
]  # fmt: skip

_BARE = """
import torch
from torch.nn import functional as F
from train.tasks.text.text_config import Model
from train.tasks.text.data import Windows, collate, tokenize
from train.tasks.text.model import Transformer
from train.tasks.text.tokenizer import ByteTokenizer
from pydoc_data.topics import topics

data = Windows(tokenize([topics[key] for key in sorted(topics)], ByteTokenizer()), 128, True)
model = Transformer(Model(layers=4, heads=4, width=128), 257, 128)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
batch = collate(data.__getitems__(range(16)))
loss = F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())
loss.backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()
print("step 1", loss.item(), flush=True)
"""


def seconds(command: list[str]) -> tuple[float, float]:
    """Seconds from the start to the line of the first step, and to the end of the process."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT}
    )
    assert process.stdout is not None
    first = next(
        (time.perf_counter() - started for line in process.stdout if line.startswith("step 1")),
        float("nan"),
    )
    process.stdout.read()
    if process.wait() != 0:
        raise SystemExit(f"{command} failed")
    return first, time.perf_counter() - started


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9, help="counted runs of each")
    arguments = parser.parse_args()
    print(machine())
    bare: list[tuple[float, float]] = []
    ours: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as directory:
        for number in range(arguments.runs + 1):
            run = [*_RUN, f"run.dir={Path(directory, str(number))}"]
            pair = (
                seconds([sys.executable, "-c", _BARE]),
                seconds([sys.executable, "-m", "train", *run]),
            )
            if number:  # the first run fills the disk cache
                bare.append(pair[0])
                ours.append(pair[1])
    rows = []
    for what, at in (("first step", 0), ("end of the process", 1)):
        a, b = [t[at] for t in bare], [t[at] for t in ours]
        rows.append(
            [what, median_and_spread(a), median_and_spread(b), median_and_spread(ratios(b, a))]
        )
    header = ["from the command to the", "bare script, s", "isorun, s", "isorun / bare"]
    print(table("Start-up (median ± half the interquartile range)", header, rows))


if __name__ == "__main__":
    main()
