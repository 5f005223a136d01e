"""Classifies errors: a lost peer rank, or out of memory."""

from __future__ import annotations

import errno
import sys

from train.exits import OutOfMemoryError, RetryError, RunError, first_line

LOST_PEER = (
    "Another rank has ended or cannot be reached, so this rank stops; see that rank's message for "
    "the cause. Rerun to resume from the last checkpoint."
)
# Messages of the plain RuntimeErrors that gloo raises.
_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Connection refused",
    "connectFullMesh failed",
)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank has ended or cannot be reached."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return False
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error)
    return "gloo" in text.lower() and any(sign in text for sign in _SIGNS)


OUT_OF_MEMORY = (
    "Out of memory ({}); lower batch.micro_batch_size (slower; changes only dropout masks), set "
    "activation_checkpointing=true, or shard the model over more ranks with strategy=fsdp2."
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host ran out of memory."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    # torch's CPU allocator raises a plain RuntimeError.
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text
    )


# Errors of the machine, not of the run: it can continue once there is space, or storage.
_MACHINE_FAILED = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE}


def as_run_error(error: BaseException) -> RunError | None:
    """The error in one sentence, with its exit code, where its cause is known."""
    if isinstance(error, RunError):
        return error
    if is_out_of_memory(error):
        return OutOfMemoryError(OUT_OF_MEMORY.format(first_line(error)))
    if is_lost_peer(error):
        return RetryError(LOST_PEER)
    if isinstance(error, OSError) and error.errno in _MACHINE_FAILED:
        return RetryError(f"{error}. Fix the cause, then rerun.")
    return None
