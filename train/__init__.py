"""isorun: distributed training whose result does not depend on where it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from train.version import __version__

__all__ = [
    "Checkpoint",
    "Exit",
    "Hook",
    "Ratio",
    "Result",
    "Run",
    "RunError",
    "Section",
    "Series",
    "Sink",
    "Task",
    "__version__",
    "evaluate",
    "fit",
    "launch",
    "load",
    "load_config",
]

if TYPE_CHECKING:
    from train.api import Result, evaluate, fit, launch, load_config
    from train.checkpoint.run_view import Checkpoint, Run, Series
    from train.exits import Exit, RunError
    from train.export.module import load
    from train.hooks import Hook
    from train.section import Section
    from train.tasks.base import Ratio, Task
    from train.track.sinks import Sink

_HOMES = {
    "Checkpoint": "train.checkpoint.run_view",
    "Exit": "train.exits",
    "Hook": "train.hooks",
    "Ratio": "train.tasks.base",
    "Result": "train.api",
    "Run": "train.checkpoint.run_view",
    "RunError": "train.exits",
    "Section": "train.section",
    "Series": "train.checkpoint.run_view",
    "Sink": "train.track.sinks",
    "Task": "train.tasks.base",
    "evaluate": "train.api",
    "fit": "train.api",
    "launch": "train.api",
    "load": "train.export.module",
    "load_config": "train.api",
}


def __getattr__(name: str) -> Any:
    # Imported when first used: `import train` and `--help` must not import torch.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
