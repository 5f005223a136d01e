"""A script or a notebook as it was before a run in its process."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from train.distributed.world import this_world

_log = logging.getLogger("train")


@contextmanager
def environment_restored() -> Iterator[None]:
    """Restores the environment variables. A run and its libraries set some for themselves: with
    LOCAL_RANK, which DeepSpeed needs, every later run would be taken for one of several ranks, and
    with WANDB_CACHE_DIR it would write into the directory of the first."""
    # Read once for the whole process, so what it adds for srun must stay.
    this_world()
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def logging_restored() -> Iterator[None]:
    """Restores the root logger, which a run configures and which belongs to the caller."""
    root, showwarning = logging.getLogger(), warnings.showwarning
    before = root.handlers[:], root.level, _log.level
    quiet = logging.NullHandler()
    _log.addHandler(quiet)  # errors are raised, not printed
    try:
        yield
    finally:
        for handler in [h for h in root.handlers if h not in before[0]]:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(before[1])
        _log.setLevel(before[2])
        _log.removeHandler(quiet)
        if warnings.showwarning is not showwarning:
            logging.captureWarnings(False)


@contextmanager
def torch_restored() -> Iterator[None]:
    """Restores torch's settings and the global random generators, and ends a process group that a
    failed start has left. Imports torch."""
    from train.distributed.randomness import GlobalRngState
    from train.distributed.torch_settings import TorchSettings

    settings, generators = TorchSettings(), GlobalRngState(cuda=True)
    try:
        yield
    finally:
        settings.restore()
        generators.restore()
        _forget_process_groups()


def _forget_process_groups() -> None:
    """Accelerate and DeepSpeed keep the groups of their first run, which are destroyed now."""
    from train.distributed.process_group import end_groups

    end_groups(failed=True)
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    if groups := sys.modules.get("deepspeed.utils.groups"):
        importlib.reload(groups)
        sys.modules["deepspeed.comm.comm"].cdb = None  # type: ignore[attr-defined]
