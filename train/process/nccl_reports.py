"""What NCCL and torch's flight recorder know of a hang, for the watchdog's report.

Nothing here calls CUDA: a thread that does may block as the main thread does.
"""

from __future__ import annotations

import os
import socket
import stat
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_PIPE = "TORCH_NCCL_DEBUG_INFO_PIPE_FILE"
_DUMPS = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
_RAS_ADDRESS = "localhost:28028"  # NCCL's default
_MOST_BYTES = 1 << 16
_STARTED = time.time()  # an older dump is of another process


def uses_gpu() -> bool:
    """Whether this process uses CUDA, and so perhaps NCCL."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


def flight_recorder(environ: Mapping[str, str], rank: int, seconds: float = 3.0) -> str | None:
    """Asks torch to dump this rank's flight recorder, where it has a pipe for that, and waits for
    the file for so many seconds. Returns its path, or None where there is none; also that of a dump
    which torch has made by itself.
    """
    asked = time.time()
    piped = _write_to_pipe(environ, rank)
    prefix = next((environ[name] for name in _DUMPS if environ.get(name)), None)
    if prefix is None:
        return "the default file of torch" if piped else None
    path = Path(f"{prefix}{rank}")
    deadline = time.monotonic() + (seconds if piped else 0.0)
    while piped and not _is_new(path, asked) and time.monotonic() < deadline:
        time.sleep(0.05)
    return str(path) if _is_new(path, _STARTED) else None


def _write_to_pipe(environ: Mapping[str, str], rank: int) -> bool:
    prefix = environ.get(_PIPE)
    if not prefix:
        return False
    try:
        # Without O_NONBLOCK, it would wait for a reader.
        pipe = os.open(f"{prefix}{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        status = os.fstat(pipe)
        if not stat.S_ISFIFO(status.st_mode) or status.st_uid != os.geteuid():
            return False  # another user may have put it there
        return os.write(pipe, b"1\n") > 0
    except OSError:
        return False
    finally:
        os.close(pipe)


def _is_new(path: Path, since: float) -> bool:
    """Whether this user's process has written the file since then."""
    with suppress(OSError):
        status = path.lstat()
        is_own = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        # Times of file systems are coarse.
        return is_own and status.st_size > 0 and status.st_mtime >= since - 1.0
    return False


def ras_status(environ: Mapping[str, str], seconds: float = 10.0) -> str | None:
    """The state of all ranks as NCCL's RAS reports it to its clients (``ncclras -v``), at most 64
    KiB; None where nothing answers."""
    if environ.get("NCCL_RAS_ENABLE", "1").strip() == "0":
        return None
    host, _, port = environ.get("NCCL_RAS_ADDR", _RAS_ADDRESS).strip().rpartition(":")
    deadline = time.monotonic() + seconds
    received = b""
    try:
        with socket.create_connection((host.strip("[]") or "localhost", int(port)), 1.0) as client:
            client.settimeout(seconds)
            # RAS answers after this time also where ranks do not.
            client.sendall(f"TIMEOUT {max(1, int(seconds / 2))}\n".encode())
            if client.recv(64).strip() != b"OK":  # another program has this port
                return None
            client.sendall(b"VERBOSE STATUS\n")
            while len(received) < _MOST_BYTES and (left := deadline - time.monotonic()) > 0:
                client.settimeout(left)
                if not (part := client.recv(4096)):
                    break
                received += part
    except (OSError, ValueError, OverflowError):  # also a time-out: what came is kept
        pass
    text = received[:_MOST_BYTES].decode(errors="replace").strip()
    return text or None
