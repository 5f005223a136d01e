"""A model's blocks: the modules that are gathered, or computed again, one at a time."""

from __future__ import annotations

from functools import partial

from torch import nn

from train.exits import UsageError


def find_blocks(model: nn.Module, named: list[nn.Module], classes: list[str]) -> list[nn.Module]:
    """Those of the given class names, or those named, or the outermost members of module lists.

    Raises UsageError for a class that is not there.
    """
    if classes:
        kinds = {type(module).__name__ for module in model.modules()}
        for name in classes:
            if name not in kinds:
                raise UsageError(
                    f"fsdp2.blocks names {name!r}, but the model has no module of this class; it "
                    f"has {', '.join(sorted(kinds))}."
                )
        return [m for m in model.modules() if type(m).__name__ in classes and m is not model]
    if named:
        return named
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            members = [m for m in module if next(m.parameters(), None) is not None]
            found += members
            inside |= {inner for member in members for inner in member.modules()}
    return found


def checkpoint_activations(blocks: list[nn.Module]) -> None:
    """Makes blocks forget what they computed, and compute it again for backward (Chen et al.,
    2016). Random numbers are drawn alike both times."""
    from torch.utils.checkpoint import checkpoint

    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
