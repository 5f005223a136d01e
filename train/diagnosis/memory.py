"""The peak of the memory in use."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import torch

_SELF = Path("/proc/self")


class PeakMemory:
    """The peak since the last ``reset``: of what torch allocates on a GPU, else of the resident set
    of this process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        """Forgets the peak so far, where the system allows it."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        with suppress(OSError):
            (_SELF / "clear_refs").write_text("5")  # see proc(5)

    def peak(self) -> int:
        """In bytes; 0 where the system does not tell."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        with suppress(OSError):
            found = re.search(r"^VmHWM:\s+(\d+) kB", (_SELF / "status").read_text(), re.MULTILINE)
            return int(found[1]) * 1024 if found else 0
        return 0
