"""Whose fault an error is: out of memory, a lost rank, the machine, or else the code or the data.

The table of causes to exit codes is that of :func:`as_run_error`; what it does not list is a bug
(70), or, while data is loaded, a fault of the data (65).
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from bdb import BdbQuit
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from train.exits import (
    DataError,
    OutOfMemoryError,
    RetryError,
    RunError,
    UsageError,
    first_line,
    message_of,
    prefixed,
)
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
        # NCCL also allocates, shares memory between processes, and uses the GPU.
        text = message_of(error)
        own = is_out_of_memory(error) or is_same_gpu(error) or _is_fault_of_gpu(text)
        return not own and not any(os.strerror(number) in text for number in _SHORTAGES)
    text = message_of(error)
    return "gloo" in text.lower() and any(sign in text for sign in _SIGNS)


OUT_OF_MEMORY = (
    "Out of memory ({}); lower batch.micro_batch_size (slower; changes only dropout masks), set "
    "activation_checkpointing=true, or shard the model over more ranks with strategy=fsdp2."
)
# Messages of the plain RuntimeErrors that torch raises for its CPU allocator, the CUDA runtime and
# driver, CUDA's libraries (cuDNN 9: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED), NCCL and
# Triton. A library that cannot allocate its handle says that it is not initialised.
_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator"
    r"|\bCU[A-Z]+_(\w+_)?ALLOC(ATION)?_FAILED\b"
    r"|\bCUSPARSE_STATUS_INSUFFICIENT_RESOURCES\b"
    r"|\bCU[A-Z]+_STATUS_NOT_INITIALIZED when calling `cu\w+Create\("
    r"|\b(CUDA|HIP) out of memory\b"
    r"|\b(CUDA|HIP)( driver)? error: out of memory"
    r"|\bCuda failure( \d+)? 'out of memory'"
    r"|Triton Error \[(CUDA|HIP)\]: out of memory",
    re.IGNORECASE,
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
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(message_of(error)))


_SIZES = {"bytes": 0, "KiB": 10, "MiB": 20, "GiB": 30}
_SIZE = r"([\d.]+) (bytes|KiB|MiB|GiB)"
_GPU_MEMORY = re.compile(
    rf"has a total capacity of {_SIZE} of which {_SIZE} is free\."
    rf".*Of the allocated memory {_SIZE} is allocated by PyTorch,.* and {_SIZE} is reserved",
    re.DOTALL,
)


def _gpu_memory_of_others(error: BaseException) -> tuple[float, float] | None:
    """What other processes use of the GPU and all that it has, in GiB, where an error of torch says
    so and others use more than half. What this process uses besides torch counts as theirs; in a
    container, torch does not know which process is this one."""
    if not (found := _GPU_MEMORY.search(message_of(error))):
        return None
    words = found.groups()
    total, free, allocated, reserved = (
        float(number) * 2.0 ** (_SIZES[unit] - 30)
        for number, unit in zip(words[::2], words[1::2], strict=True)
    )
    others = total - free - allocated - reserved
    return (others, total) if others > total / 2 else None


_SAME_GPU = re.compile(r"Duplicate GPU detected : rank (\d+) and rank (\d+)")


def is_same_gpu(error: BaseException) -> bool:
    """Whether NCCL has found two ranks on one GPU."""
    return isinstance(error, RuntimeError) and bool(_SAME_GPU.search(message_of(error)))


# CUDA's texts for a GPU that is broken, lost or taken, not for what the code asked of it.
_GPU_FAILED = re.compile(
    r"(CUDA( driver)? error:|Cuda failure( \d+)?) '?"
    r"(uncorrectable (ECC|NVLink) error|unknown error|hardware stack error"
    r"|system not yet initialized"
    r"|(all )?CUDA-capable device(s|\(s\)) (is/)?are busy or unavailable)",
    re.IGNORECASE,
)
# Those and all others of CUDA and HIP.
_GPU_ERROR = re.compile(r"\b(CUDA|HIP)( driver)? error:|\bCuda failure|Triton Error \[")


def is_of_accelerator(error: BaseException) -> bool:
    """Whether the error, or one before it, is of the GPU of this process. After most of these every
    further call fails, also the ones of tensors' destructors, which end the process by SIGABRT."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    return any(
        isinstance(each, torch.AcceleratorError)
        or (isinstance(each, RuntimeError) and _GPU_ERROR.search(message_of(each)))
        for each in _chain(error, lambda each: each.__cause__ or each.__context__)
    )


def _chain(
    error: BaseException, before: Callable[[BaseException], BaseException | None]
) -> Iterator[BaseException]:
    """The error, the one before it, and so on; each once, also where they name each other."""
    seen: set[int] = set()
    inner: BaseException | None = error
    while inner is not None and id(inner) not in seen:
        seen.add(id(inner))
        yield inner
        inner = before(inner)


def _is_fault_of_gpu(text: str) -> bool:
    return bool(_GPU_FAILED.search(text))


# Faults of the machine, its storage or its network, not of the run: it can continue later.
_MACHINE_FAILED = (
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE,
    errno.EREMOTEIO, errno.ENODEV, errno.ENXIO, errno.ENOLINK, errno.ETIMEDOUT, errno.ECONNRESET,
    errno.ECONNREFUSED, errno.ECONNABORTED, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ENETRESET,
    # Of file systems: FUSE whose process died, Lustre that evicted the host, locks of NFS, a file
    # system that found itself damaged, an expired Kerberos ticket.
    errno.ENOTCONN, errno.ESHUTDOWN, errno.ENOLCK, errno.EUCLEAN, errno.EKEYEXPIRED,
    errno.EAGAIN,  # the limit of processes
)  # fmt: skip
# Of these, those that NCCL reports of its own host.
_SHORTAGES = (errno.ENOSPC, errno.EMFILE, errno.ENFILE)
# Errors of networks that are not among Python's own: of requests, urllib3, botocore and aiohttp.
_NETWORK_ERRORS = {
    "ConnectionError", "Timeout", "URLError", "TimeoutError", "ConnectTimeoutError",
    "ReadTimeoutError", "NewConnectionError", "EndpointConnectionError", "ClientConnectionError",
    "HTTPClientError", "ProtocolError", "IncompleteRead",
}  # fmt: skip
# Errors of Python's own whose numbers are not those of the system: of names, and of TLS.
_OTHER_NUMBERS = {"gaierror", "SSLEOFError", "SSLZeroReturnError"}
_NO_THREAD = "can't start new thread"  # Python's message at the limit of processes


def is_fault_of_machine(error: BaseException) -> bool:
    """Whether storage, network or the limits of the machine failed, so that a retry may succeed."""
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & _OTHER_NUMBERS:
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _MACHINE_FAILED
    if isinstance(error, TimeoutError):
        return True
    if names & _NETWORK_ERRORS:
        return not _is_refusal(error) and not isinstance(error, BrokenPipeError)
    # torch and libraries in Rust raise their own errors with the text of the system's.
    text = message_of(error)
    return isinstance(error, RuntimeError | OSError) and (
        _is_fault_of_gpu(text)
        or _NO_THREAD in text
        or any(os.strerror(number) in text for number in _MACHINE_FAILED)
    )


def _is_refusal(error: BaseException) -> bool:
    """Whether a server has answered that the request is wrong (HTTP 4xx)."""
    status = None
    with suppress(Exception):  # of a property of the error's class
        response = getattr(error, "response", None)
        status = getattr(error, "code", None) or getattr(response, "status_code", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)


def as_run_error(error: BaseException) -> RunError | None:
    """The error in one sentence, with its exit code, where its cause is known: by the error itself,
    by the one that it was raised from, or, for a group of errors, by each of them."""
    outer = ""
    for inner in _chain(error, lambda each: each.__cause__):
        if isinstance(inner, BaseExceptionGroup):
            parts = [as_run_error(part) for part in inner.exceptions]
            known = parts[0] if all(parts) else None
        else:
            known = _known(inner)
        if known:
            return prefixed(outer, known) if outer else known
        outer = outer or f"{type(inner).__name__}: {first_line(inner)}"
    return None


def fault_of(error: BaseException, otherwise: RunError) -> RunError:
    """The error of the machine or its memory, where that is the cause of an error; else
    ``otherwise``, which blames the command or the data."""
    known = as_run_error(error)
    return known if isinstance(known, RetryError | OutOfMemoryError) else otherwise


@contextmanager
def written_to(option: str, directory: Path) -> Iterator[None]:
    """The body writes to the directory that an option names; raises UsageError where that cannot be
    written to."""
    try:
        yield
    except OSError as error:
        wrong = UsageError(
            f"{option} is {str(directory)!r}, which cannot be written to "
            f"({error.strerror or first_line(error)}); name another directory."
        )
        raise fault_of(error, wrong) from error


def _known(error: BaseException) -> RunError | None:
    if isinstance(error, RunError):
        return error
    if is_out_of_memory(error):
        return _out_of_memory(error)
    if wrong := _wrong_use(error):
        return wrong
    if is_lost_peer(error):
        return RetryError(LOST_PEER)
    if is_fault_of_machine(error):
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        return RetryError(f"{kind}{_reason(error)}. Fix the cause, then rerun.")
    return None


def _place_of(error: BdbQuit) -> str:
    """The line with the breakpoint."""
    frames = traceback.extract_tb(error.__traceback__)
    user = [f for f in frames if Path(f.filename).name not in ("bdb.py", "pdb.py")]
    return f" in {Path(user[-1].filename).name}:{user[-1].lineno}" if user else ""


def _wrong_use(error: BaseException) -> RunError | None:
    if isinstance(error, BdbQuit):
        return RunError(
            f"The debugger has ended{_place_of(error)}, by its command q or because there is no "
            "terminal. Remove the breakpoint, or run one process on a terminal, with "
            "loader.workers=0."
        )
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        path = error.filename if isinstance(error.filename, str) else ""
        return UsageError(
            f"The path {path[:80]!r}... is longer than the file system allows; choose a shorter "
            "one."
        )
    if isinstance(error, TooLargeError):
        return DataError(f"{error.filename} cannot be read ({error.strerror}); use a smaller file.")
    if is_same_gpu(error):
        return UsageError(
            f"Two ranks have the same GPU ({_reason(error)}); start at most one rank per GPU, and "
            "let the launcher set LOCAL_RANK, from 0 on each host."
        )
    if any(cls.__name__ == "CheckpointError" for cls in type(error).__mro__):  # torch's
        return UsageError(
            f"A block computes something else when it is recomputed for backward "
            f"({first_line(error)}); let it depend on its arguments, parameters, buffers and "
            "random numbers alone, or set activation_checkpointing=false."
        )
    return None


def _out_of_memory(error: BaseException) -> RunError:
    if others := _gpu_memory_of_others(error):
        return RetryError(
            f"Out of memory on a GPU of which other processes use about {others[0]:.1f} of "
            f"{others[1]:.1f} GiB. End them (nvidia-smi lists them), then rerun."
        )
    return OutOfMemoryError(OUT_OF_MEMORY.format(_reason(error)))


def _reason(error: BaseException) -> str:
    """The line of an error's message that names the cause: of NCCL's, the last error."""
    _, marker, rest = message_of(error).partition("Last error:")
    lines = [line.strip() for line in rest.splitlines() if line.strip()] if marker else []
    return lines[0].rstrip(".") if lines else first_line(error)
