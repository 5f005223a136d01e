"""The history of allocations on a GPU, for a snapshot when its memory runs out."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

_ENTRIES = 100_000  # allocations and releases; the newest ones are kept


def start_history(device: torch.device) -> None:
    """Records allocations on a GPU of CUDA from now on, with the code that makes them; does nothing
    for another device. Raises an exception of torch."""
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=_ENTRIES)


def write_snapshot(path: Path) -> None:
    """Writes what is allocated and the history, for https://pytorch.org/memory_viz. Raises
    OSError, or an exception of torch."""
    number, temporary = tempfile.mkstemp(prefix=".memory-", dir=path.parent)
    os.close(number)
    try:
        torch.cuda.memory._dump_snapshot(temporary)  # type: ignore[no-untyped-call]
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
