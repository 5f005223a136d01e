"""isorun: distributed training whose result does not depend on where it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Ratio", "Section", "Task", "load"]

if TYPE_CHECKING:
    from train.export.module import load
    from train.section import Section
    from train.tasks.base import Ratio, Task

_HOMES = {
    "load": "train.export.module",
    "Ratio": "train.tasks.base",
    "Section": "train.section",
    "Task": "train.tasks.base",
}


def __getattr__(name: str) -> Any:
    # Looked up when asked for: `python -m train --help` must not import torch.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'train' has no attribute {name!r}")
