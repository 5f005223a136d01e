"""Large text models on a GPU: throughput, MFU and memory of isorun and of a bare loop."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.contenders import bare, isorun, isorun_without_sinks
from benchmarks.loop import SAME, measure
from benchmarks.team import Team
from benchmarks.timing import median_and_spread, ratios, table

CONTENDERS = {"bare PyTorch": bare, "isorun": isorun, "isorun, no sinks": isorun_without_sinks}
VOCABULARY = 50_304
"""GPT-2's vocabulary rounded up to a multiple of 64; the text uses 257 of the ids."""


def large_sizes(turns: int | None) -> list[Any]:
    """Models of 124 million and 1 billion parameters, tied embedding included."""
    from benchmarks.workload import Size

    common: dict[str, Any] = {
        "context": 1024, "precision": "bf16", "compile": True, "vocabulary": VOCABULARY,
        "rounds": turns or 12,
    }  # fmt: skip
    return [
        Size("124 M", layers=12, heads=12, width=768, batch=16, steps=20, **common),
        Size("1 B", layers=18, heads=16, width=2048, batch=8, steps=10, **common),
    ]


def large(turns: int | None) -> None:
    """Prints a table per model, or why it was skipped."""
    import torch

    print("\n## Large models on one GPU: bf16, torch.compile")
    if not torch.cuda.is_available():
        print("\nskipped: no GPU", flush=True)
        return
    for size in large_sizes(turns):
        teams: list[Team] = []
        try:
            teams += [Team(name, train, [size]) for name, train in CONTENDERS.items()]
            print(_report(size, measure(teams, size)), flush=True)
        except SystemExit as error:
            if "OutOfMemoryError" not in str(error):
                raise
            print(
                f"\n### {size.name}: skipped, {len(CONTENDERS)} contenders do not fit on this GPU"
            )
        finally:
            for team in teams:
                team.end()


def _report(size: Any, result: Any) -> str:
    import torch

    from train.loop.mfu import peak_flops
    from train.tasks.text.model import Transformer
    from train.tasks.text.text_config import Model

    with torch.device("meta"):
        shape = Model(layers=size.layers, heads=size.heads, width=size.width)
        model = Transformer(shape, VOCABULARY, size.context)
    device = torch.device("cuda", 0)
    peak = peak_flops(device, size.precision)
    flops = model.flops_per_token(size.context) * size.context * size.batch
    reference, truth = (next(iter(d.values())) for d in (result.seconds, result.trained))
    rows = []
    for name, seconds in result.seconds.items():
        tokens = [size.batch * size.context / s for s in seconds]
        trained = result.trained[name]
        pairs = zip(trained.losses[:SAME], truth.losses, strict=False)
        rows.append(
            [
                name,
                median_and_spread(seconds, 2, 1e3),
                median_and_spread(tokens, 1, 1e-3),
                median_and_spread([100 * flops / s / peak for s in seconds], 1) if peak else "?",
                f"{trained.first_peak / 2**30:.2f}",
                f"{trained.peak / 2**30:.2f}",
                median_and_spread(ratios(reference, seconds), 4),
                f"{max(abs(a - b) / b for a, b in pairs):.0e}",
            ]
        )
    return table(
        f"### {size.name}: {median(reference) * 1e3:.1f} ms per bare step of {size.batch} x "
        f"{size.context} tokens on {torch.cuda.get_device_name(device)}, torch "
        f"{torch.__version__}; {len(reference)} of {result.rounds} rounds of {size.steps} steps, "
        f"during which other processes used {result.others:.2f} cores",
        [
            "", "ms per step", "thousand tokens/s", "MFU, %", "peak GiB, start",
            "peak GiB, later", "bare / contender",
            f"maximum difference of the first {SAME} losses",
        ],
        rows,
    )  # fmt: skip
