"""Imports DeepSpeed without the side effects that a run must not have."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch

from train.imports import import_extra


def import_deepspeed(device: torch.device) -> Any:
    """Imports DeepSpeed, configured for the device, without its start-up compilation and logs.

    Raises UsageError where it cannot be imported.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed uses names that torch has deprecated.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated")
    deepspeed = import_extra("deepspeed", "deepspeed", "A ZeRO strategy", "use strategy=fsdp2")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        # Compiling this shared-memory extension takes 40 s at start, and it is not needed.
        compatible = getattr(deepspeed.ops, "__compatible_ops__", {})
        compatible["deepspeed_shm_comm"] = False
    return deepspeed
