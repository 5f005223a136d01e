"""Imports torch for the agent, which itself reports what its C++ code would log at length."""

from __future__ import annotations

import importlib
import os

_LEVEL = "TORCH_CPP_LOG_LEVEL"


def import_torch() -> None:
    """Imports torch so that it does not write a C++ stack at each call of a store that is gone.
    The ranks do not inherit this; the variable, if it is set, takes precedence."""
    if _LEVEL in os.environ:
        return
    os.environ[_LEVEL] = "ERROR"
    try:
        importlib.import_module("torch")
    finally:
        del os.environ[_LEVEL]
