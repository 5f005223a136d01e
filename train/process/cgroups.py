"""The cgroups of this process, whose files have its limits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def cgroups_of_process(
    controller: str, cgroups: Path = CGROUPS, own: Path = OWN_CGROUP
) -> Iterator[Path]:
    """The directories of this process's cgroup and of those above it, in version 2 and in version 1
    of cgroups, up to the root of what is mounted here; some may not exist.

    In a container this is often the root alone: its own cgroup is mounted there. ``controller`` is
    that of version 1, such as memory.
    """
    paths = {cgroups: "", cgroups / controller: ""}
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                paths[cgroups] = path
            elif controller in controllers.split(","):
                paths[cgroups / controller] = path
                paths[cgroups / controllers] = path  # such as cpu,cpuacct
    for root, path in paths.items():
        yield root
        place = root / path.lstrip("/")
        while place != root and root in place.parents and ".." not in place.parts:
            yield place
            place = place.parent
