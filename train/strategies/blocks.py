"""A model's blocks: modules that are gathered, or recomputed for backward, one at a time."""

from __future__ import annotations

from torch import nn

from train.exits import UsageError


def find_blocks(model: nn.Module, named: list[nn.Module], classes: list[str]) -> list[nn.Module]:
    """The modules of the given ``classes`` (names), else those of ``named``, else the outermost
    members of the model's module lists.

    Raises UsageError for a class that the model has no module of.
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
