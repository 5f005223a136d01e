"""Seeds of the global generators, and deterministic operations."""

from __future__ import annotations

import os
import random

import numpy as np
import torch


def seed_everything(seed: int, device: torch.device | None = None) -> None:
    """Seeds torch (the CPU generator and, with ``device``, CUDA's), numpy and ``random``.

    ``seed`` has 64 bits; numpy takes the lower 32. The CPU generator is seeded directly, because
    ``torch.manual_seed`` takes 80 times as long and this runs for every micro-batch.
    """
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


def make_deterministic() -> None:
    """Switches torch to deterministic algorithms; call it before the first use of CUDA."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
