"""Sends code by an object store: the launch stores it with the credentials of its user, and the
init container of each pod reads it with those that the training has for mirrors."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath
from typing import Any

from launch.contract import (
    RetryError,
    UsageError,
    is_misconfigured,
    is_secret_value,
    log,
    open_storage,
    storage_error,
)
from launch.kubernetes import checks
from launch.kubernetes.cluster import Cluster
from launch.kubernetes.code_carrier import INIT, Carrier
from launch.kubernetes.rendering import Rendered

RENEWED_DAYS = 7
"""An archive of this age is stored again, so that a rule of the store that removes old objects
counts from the last launches and not from the first."""
_OPTION = "-cfg sync_store"
_ADDRESS = "AWS_ENDPOINT_URL is the address of a store that is not Amazon's"
# Protocols of what only one machine or one process has.
_LOCAL = ("file", "local", "memory")
# Variables that the libraries of object stores read, and those of a proxy and its certificates.
_VARIABLES = re.compile(
    r"AWS_(?!BEARER_)\w+|GOOGLE_(APPLICATION|CLOUD)_\w+|GCSFS_\w+|GCE_METADATA_\w+"
    r"|AZURE_STORAGE_\w+|FSSPEC_\w+|STORAGE_EMULATOR_HOST"
    r"|(HTTPS?|ALL|NO)_PROXY|SSL_CERT_(FILE|DIR)|(REQUESTS|CURL)_CA_BUNDLE",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Store(Carrier):
    """Carries it as ``URL/.code/DIGEST.tar.gz``."""

    url: str

    @property
    def source(self) -> str:
        """See Carrier."""
        return f"{self.url}/{self.bundle.key}"

    @property
    def place(self) -> str:
        """See Carrier."""
        return self.source

    def complete(self, rendered: Rendered) -> Rendered:
        """The objects, where the init container reaches the store as the container that trains
        does: with its variables for stores, and the mounts of files that these name."""
        made = copy.deepcopy(rendered.objects)
        for _, pod in checks.pods(made):
            for init in pod.get("initContainers") or []:
                if init["name"] == INIT:
                    _give_access(init, pod["containers"][0])
        return replace(rendered, objects=made)

    def send(self, cluster: Cluster, rendered: Rendered) -> None:
        """Stores the archive, unless it is there, new and of its size. What an interrupted upload
        may leave in a store that shows it is smaller; and the pods compare the digest."""
        storage = open_storage(self.url, {}, f"{_OPTION} is")
        key, size = self.bundle.key, len(self.bundle.archive)
        try:
            if storage.size(key) == size and _is_new(storage.modified(key)):
                log(f"the code is at {self.source} already")
                return
            log(f"sending {size / 2**20:.1f} MiB of code to {self.source}")
            storage.write(key, self.bundle.archive)
            found = storage.size(key)
        except Exception as error:
            raise _refusal(self.url, error) from error
        if found != size:
            raise RetryError(
                f"{self.source} has {found or 0:,} bytes after the upload, not {size:,}; rerun to "
                "send it again."
            )


def folder_url(url: str) -> str:
    """The URL of a folder, without a slash at its end. Raises UsageError."""
    if is_secret_value(url):
        raise UsageError(
            f"{_OPTION} has a secret in its URL, which the objects of the run would show; give "
            "only the place, such as s3://bucket/folder, and set credentials in the environment."
        )
    protocol, _, place = url.partition("://")
    if protocol in _LOCAL or not place.strip("/"):
        raise UsageError(
            f"{_OPTION} is {url!r}, but must be the URL of a folder that both this machine and the "
            "pods reach, such as s3://bucket/folder; for a volume of the pods use -cfg "
            "sync_volume=true."
        )
    return url.rstrip("/")


def _is_new(modified: datetime | None) -> bool:
    return modified is None or datetime.now(UTC) - modified < timedelta(days=RENEWED_DAYS)


def _give_access(init: dict[str, Any], main: dict[str, Any]) -> None:
    """Gives an init container the variables and files of another for object stores."""
    env = [entry for entry in main.get("env") or [] if _VARIABLES.fullmatch(entry["name"])]
    files = [PurePosixPath(str(entry.get("value", ""))) for entry in env]
    mounts = [
        mount
        for mount in main.get("volumeMounts") or []
        if any(file.is_relative_to(mount["mountPath"]) for file in files)
    ]
    if env:
        init["env"] = [*(init.get("env") or []), *env]
    init["volumeMounts"] += mounts


def _refusal(url: str, error: Exception) -> UsageError | RetryError:
    if is_misconfigured(error):
        return UsageError(
            f"{_OPTION}={url} refused the code ({storage_error(error)}); correct your credentials "
            f"or your rights to list, read and write there. {_ADDRESS}."
        )
    return RetryError(
        f"The code cannot be sent to {_OPTION}={url} ({storage_error(error)}); rerun when this "
        f"machine can reach it, or use -cfg sync_volume=true. {_ADDRESS}."
    )
