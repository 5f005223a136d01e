"""TorchX's built-in components that only some versions of TorchX have.

The entry points in pyproject.toml list TorchX's own components too. An entry point that names a
missing module would make every ``torchx`` command fail.
"""

from __future__ import annotations

import importlib
from types import ModuleType


def metrics() -> ModuleType:
    """TensorBoard."""
    return _module("torchx.components.metrics")


def serve() -> ModuleType:
    """TorchServe."""
    return _module("torchx.components.serve")


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return ModuleType(name)  # an empty module: TorchX finds no component in it
