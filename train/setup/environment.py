"""What an attempt runs in: versions, devices, and the container image."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from train.secrets import redact

if TYPE_CHECKING:
    import torch

IMAGE = "ISORUN_IMAGE"
"""The container image, with its digest where that is known; set by what starts the container."""
# Of Apptainer and its predecessor: the path or the reference of the image.
_IMAGES = (IMAGE, "APPTAINER_CONTAINER", "SINGULARITY_CONTAINER")
PACKAGES = ("torch", "accelerate", "deepspeed", "numpy")
_DRIVER = Path("/proc/driver/nvidia/version")


def environment(device: torch.device) -> dict[str, str]:
    """The versions of Python, packages and drivers, and the kinds of machine and GPU, by name;
    without what there is not."""
    found = {"python": platform.python_version(), **package_versions([*PACKAGES, "wandb"])}
    found["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    if device.type == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda)
        if torch.distributed.is_nccl_available():
            found["nccl"] = nccl_version()
    if driver := driver_version():
        found["driver"] = driver
    return found


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """The versions of the distributions that are installed; none is imported."""
    from importlib.metadata import PackageNotFoundError, version  # slow, and each start loads this

    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def nccl_version() -> str:
    """The version of NCCL that torch uses."""
    import torch

    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def driver_version() -> str | None:
    """The version of NVIDIA's driver; None without one."""
    try:
        match = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", _DRIVER.read_text())
    except OSError:
        return None
    return match[1] if match else "unknown"


def image(environ: Mapping[str, str] = os.environ) -> str | None:
    """The container image, as what started the container tells it; None where nothing does."""
    found = next((environ[name] for name in _IMAGES if environ.get(name, "").strip()), "")
    line = redact(found.strip())[:512]
    return line if line.isprintable() and line else None
