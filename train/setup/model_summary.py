"""A table of a model's parameters."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def model_summary(model: nn.Module) -> str:
    """Trainable and frozen parameters by top-level module, a line each, and their sum."""
    rows: list[tuple[str, Iterable[nn.Parameter]]] = [
        (f"{name} ({type(child).__name__})", child.parameters())
        for name, child in model.named_children()
    ]
    own = list(model.parameters(recurse=False))
    if own:
        rows.append(("(own)", own))
    rows.append((f"total ({type(model).__name__})", model.parameters()))
    lines = [f"{'module':<36}{'trainable':>14}{'frozen':>14}"]
    for name, parameters in rows:
        counts = {True: 0, False: 0}
        for parameter in parameters:
            counts[parameter.requires_grad] += parameter.numel()
        lines.append(f"{name:<36}{counts[True]:>14,}{counts[False]:>14,}")
    if sum(p.numel() for c in model.children() for p in c.parameters()) > sum(
        p.numel() for p in model.parameters()
    ):
        lines.append("(parameters that modules share are counted once in the total)")
    return "\n".join(lines)
