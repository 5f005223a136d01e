"""Seeds and states of the global generators, and deterministic operations."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


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


class GlobalRngState:
    """The states of the global generators of torch (CPU), numpy and ``random`` when it is made;
    with ``cuda``, also of the current CUDA device, where CUDA is in use."""

    def __init__(self, *, cuda: bool = False) -> None:
        in_use = cuda and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._cuda = torch.cuda.current_device() if in_use else None
        self._torch, self._numpy, self._random = self._states()

    def _states(self) -> tuple[list[Tensor], Any, Any]:
        generators = [torch.default_generator.get_state()]
        if self._cuda is not None:
            generators.append(torch.cuda.get_rng_state(self._cuda))
        return generators, np.random.get_state(), random.getstate()

    def changed(self) -> bool:
        """Whether a generator has been used since."""
        generators, numpy_state, random_state = self._states()
        return (
            not all(map(torch.equal, self._torch, generators))
            or self._random != random_state
            or any(not np.array_equal(a, b) for a, b in zip(self._numpy, numpy_state, strict=True))
        )

    def restore(self) -> None:
        """Gives the generators their states back."""
        torch.default_generator.set_state(self._torch[0])
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._torch[1], self._cuda)
        np.random.set_state(self._numpy)
        random.setstate(self._random)


def make_deterministic() -> None:
    """Switches torch to deterministic algorithms; call it before the first use of CUDA."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
