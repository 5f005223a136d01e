"""Whose fault an error is: out of memory, a lost rank, the machine, or else the code or the data.

The table of causes to exit codes is that of :func:`as_run_error`; what it does not list is a bug
(70), or, while data is loaded, a fault of the data (65).
"""

from __future__ import annotations

import errno
import os
import sys

from train.exits import DataError, OutOfMemoryError, RetryError, RunError, first_line
from train.files import TooLargeError

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
        return not is_out_of_memory(error)  # NCCL also allocates
    text = str(error)
    return "gloo" in text.lower() and any(sign in text for sign in _SIGNS)


OUT_OF_MEMORY = (
    "Out of memory ({}); lower batch.micro_batch_size (slower; changes only dropout masks), set "
    "activation_checkpointing=true, or shard the model over more ranks with strategy=fsdp2."
)
# Messages of the plain RuntimeErrors that torch raises: its CPU allocator, CUDA and its libraries,
# and NCCL.
_NO_MEMORY = (
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "CUDA failure 'out of memory'",
    "Cuda failure 'out of memory'",
    "Cuda failure 2 'out of memory'",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host ran out of memory."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (
        torch is not None and isinstance(error, torch.OutOfMemoryError)
    ):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in _NO_MEMORY)


# Faults of the machine, its storage or its network, not of the run: it can continue later.
_MACHINE_FAILED = (
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE,
    errno.EREMOTEIO, errno.ENODEV, errno.ENXIO, errno.ENOLINK, errno.ETIMEDOUT, errno.ECONNRESET,
    errno.ECONNREFUSED, errno.ECONNABORTED, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
)  # fmt: skip
# Errors of networks that are not among Python's own: of requests, urllib3, botocore and aiohttp.
_NETWORK_ERRORS = {
    "ConnectionError", "Timeout", "URLError", "TimeoutError", "ConnectTimeoutError",
    "ReadTimeoutError", "NewConnectionError", "EndpointConnectionError", "ClientConnectionError",
    "HTTPClientError", "ProtocolError",
}  # fmt: skip


def is_fault_of_machine(error: BaseException) -> bool:
    """Whether storage, network or the limits of the machine failed, so that a retry may succeed."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _MACHINE_FAILED
    if isinstance(error, TimeoutError):
        return True
    if {cls.__name__ for cls in type(error).__mro__} & _NETWORK_ERRORS:
        return not _is_refusal(error) and not isinstance(error, BrokenPipeError)
    # torch and libraries in Rust raise their own errors with the text of the system's.
    text = str(error)
    return isinstance(error, RuntimeError | OSError) and any(
        os.strerror(number) in text for number in _MACHINE_FAILED
    )


def _is_refusal(error: BaseException) -> bool:
    """Whether a server has answered that the request is wrong (HTTP 4xx)."""
    response = getattr(error, "response", None)
    status = getattr(error, "code", None) or getattr(response, "status_code", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)


def as_run_error(error: BaseException) -> RunError | None:
    """The error in one sentence, with its exit code, where its cause is known."""
    if isinstance(error, RunError):
        return error
    if is_out_of_memory(error):
        return OutOfMemoryError(OUT_OF_MEMORY.format(first_line(error)))
    if isinstance(error, TooLargeError):
        return DataError(f"{error.filename} cannot be read ({error.strerror}); use a smaller file.")
    if is_lost_peer(error):
        return RetryError(LOST_PEER)
    if is_fault_of_machine(error):
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        return RetryError(f"{kind}{first_line(error)}. Fix the cause, then rerun.")
    return None
