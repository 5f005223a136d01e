"""Tells running out of memory from other errors."""

from __future__ import annotations

import sys

OUT_OF_MEMORY = (
    "Out of memory ({}); make batch.micro_batch_size smaller, which costs time and changes "
    "nothing but dropout's masks, set activation_checkpointing=true, or cut the model over more "
    "ranks with strategy=fsdp2."
)


def is_out_of_memory(error: BaseException) -> bool:
    """Of a device, or of the host."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    # What torch's CPU allocator says, in a plain RuntimeError.
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text
    )
