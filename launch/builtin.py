"""Components that TorchX has built in, in some versions only (see the entry points).

An entry point that names a missing module would end every ``torchx`` command.
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
        return ModuleType(name)  # in which TorchX finds nothing
