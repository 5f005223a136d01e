"""The options of ``kubernetes_job`` that send the working tree, and the carrier they choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launch.contract import UsageError
from launch.kubernetes.code_bundle import collect
from launch.kubernetes.code_carrier import Carrier, ConfigMaps, fits_config_maps
from launch.kubernetes.code_store import Store, folder_url
from launch.kubernetes.code_volume import Volume

CODE_OPTIONS: list[tuple[str, type, Any, str]] = [
    ("sync", bool, False, "send the working tree to the pods, to use before the image's code"),
    ("sync_volume", bool, False, "as sync, on the volume with the runs whatever the size"),
    ("sync_store", str, None, "as sync, by an object store, such as s3://bucket/folder"),
]
"""Option, type, default, help."""


def carried(cfg: Mapping[str, Any]) -> Carrier | None:
    """The working tree with the carrier that the options of the scheduler ask for; None without.
    Raises UsageError."""
    url, on_volume = cfg.get("sync_store"), bool(cfg.get("sync_volume"))
    if url is not None and on_volume:
        raise UsageError(
            "-cfg sync_store and sync_volume cannot be combined: each is where the code is sent; "
            "choose one."
        )
    if url is not None:
        place = folder_url(url)  # checked before the tree is read
        return Store(collect(), place)
    if not on_volume and not cfg.get("sync"):
        return None
    bundle = collect()
    return ConfigMaps(bundle) if fits_config_maps(bundle) and not on_volume else Volume(bundle)
