"""What torch.compile needs of a machine, checked before the first step instead of in it."""

from __future__ import annotations

import os
import shutil
import socket
import sysconfig
import tempfile
from pathlib import Path

from train.distributed.collectives import Collectives
from train.exits import UsageError


def check_compiler(collectives: Collectives, device_type: str, origin: str) -> None:
    """Raises UsageError on all ranks if the machine of any rank cannot compile a model; collective.
    ``origin``: where ``compile`` was set."""
    everyone = collectives.all_gather_object((socket.gethostname(), lacking(device_type)))
    host, lack = next((each for each in everyone if each[1]), (None, None))
    if lack:
        raise UsageError(
            f"compile is true ({origin}), but {host} {lack}; the image with the target "
            f"{'cpu' if device_type == 'cpu' else device_type}-compile has all of it, or set "
            "compile=false."
        )


def lacking(device_type: str) -> str | None:
    """What this machine lacks to compile for a type of device; None for nothing that is known.

    Inductor compiles C++ on CPUs with ``CXX`` or g++; Triton compiles its launchers in C with
    ``CC``, gcc or clang. Both include Python's headers and load the result from a cache.
    """
    if device_type == "cpu":
        name, programs = "C++ compiler", [os.environ.get("CXX", "g++")]
        if os.environ.get("TORCH_INDUCTOR_INSTALL_GXX"):
            programs = []  # torch installs one
    else:
        own = os.environ.get("CC")
        name, programs = "C compiler", [own] if own else ["gcc", "clang"]
    if programs and not any(map(shutil.which, programs)):
        package = "g++" if device_type == "cpu" else "gcc"
        return f"has no {name} ({' or '.join(programs)}); install one (Debian's package {package})"
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").exists():
        return f"has no {headers}/Python.h; install Python's headers (Debian's package python3-dev)"
    for place in _caches(device_type):
        if os.statvfs(_existing(place)).f_flag & os.ST_NOEXEC:
            return (
                f"does not allow to run code from {place}, which is mounted noexec; mount it with "
                "exec (Docker: --tmpfs /scratch:exec), or set TORCHINDUCTOR_CACHE_DIR and "
                "TRITON_CACHE_DIR to other directories"
            )
    return None


def _caches(device_type: str) -> list[Path]:
    """Where compiled code is kept."""
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()
    triton = os.environ.get("TRITON_CACHE_DIR") if device_type != "cpu" else None
    return [Path(place) for place in (inductor, triton) if place]


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())
