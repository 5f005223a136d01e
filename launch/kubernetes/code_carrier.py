"""What brings the code of a submission to its pods: ConfigMaps, and what the other carriers, the
volume with the runs and an object store, have in common with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from launch.kubernetes.cluster import Cluster
from launch.kubernetes.code_bundle import CodeBundle
from launch.kubernetes.rendering import Rendered

Object = dict[str, Any]
PART = 900 << 10
"""Bytes in one ConfigMap, which may have 1 MiB."""
PARTS = 8
"""Of an archive in ConfigMaps; a larger one needs another carrier."""
MOUNTED_PARTS = "/isorun-parts"
"""Where the init container sees the ConfigMaps."""
INIT = "code"
"""The name of the init container that unpacks the archive."""


@dataclass(frozen=True)
class Carrier(ABC):
    """Code, and what brings it to the pods."""

    bundle: CodeBundle

    @property
    @abstractmethod
    def source(self) -> str:
        """Where the init container reads the archive: a path, or a URL."""

    @property
    def parts(self) -> list[bytes]:
        """What each ConfigMap has of the archive. There is at least one, for the program that
        unpacks it."""
        return [b""]

    @property
    def mounts(self) -> list[Object]:
        """Further mounts of the init container."""
        return []

    @property
    def place(self) -> str:
        """Where ``send`` stores the archive, for messages; empty if it does not."""
        return ""

    def complete(self, rendered: Rendered) -> Rendered:
        """The objects with what the init container needs of the other containers. Raises
        UsageError if the pods cannot get the code."""
        return rendered

    @abstractmethod
    def send(self, cluster: Cluster, rendered: Rendered) -> None:
        """Stores the archive, unless it is there, before the run is created. Raises UsageError or
        RetryError."""


class ConfigMaps(Carrier):
    """Carries it in objects of the run."""

    @property
    def source(self) -> str:
        """See Carrier."""
        return MOUNTED_PARTS

    @property
    def parts(self) -> list[bytes]:
        """See Carrier."""
        archive = self.bundle.archive
        return [archive[at : at + PART] for at in range(0, len(archive), PART)]

    def send(self, cluster: Cluster, rendered: Rendered) -> None:
        """Nothing: they are among the objects of the run."""


def fits_config_maps(bundle: CodeBundle) -> bool:
    """Whether ConfigMaps can carry it."""
    return len(bundle.archive) <= PART * PARTS
