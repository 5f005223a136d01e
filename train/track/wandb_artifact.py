"""The artifact of a checkpoint: its files, and what W&B shows of it.

Files that never change are uploaded from where they are, so that no copy of them is made;
``manifest.json`` and the files of the run, which may change, are copied first.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.checkpoint.layout import json_sha256, step_name
from train.checkpoint.manifest import MANIFEST, Manifest
from train.checkpoint.received import RUN, RUN_FILES
from train.checkpoint.store import CheckpointStore
from train.files import create, open_regular, refuse_link
from train.track.sinks import RunInfo

STAGING = "wandb/staging"
"""Where copies are until they are uploaded, in the run directory."""
_LONGEST_NAME = 128
_BLOCK = 1 << 20


def collection_name(kind: str, wandb_id: str) -> str:
    """The name of a run's artifacts of one kind, such as ``checkpoint-ID``."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{kind}-{wandb_id}")[:_LONGEST_NAME]


def content_digest(manifest: Manifest) -> str:
    """The SHA-256 of the list of a checkpoint's files. Unlike that of the whole manifest, it stays
    if an evaluation is added later."""
    return json_sha256(manifest.files)


def checkpoint_artifact(
    run: RunInfo, store: CheckpointStore, manifest: Manifest, mirror_url: str | None, by: str
) -> Any:
    """The ``wandb.Artifact`` of a committed checkpoint, not logged yet.

    ``by`` is "upload", or "reference" for data files that stay where they are: in the mirror at
    ``mirror_url``, or without one in the run directory. Raises OSError.
    """
    import wandb

    folder = store.path(manifest.step)
    is_upload = by == "upload"
    artifact = wandb.Artifact(
        collection_name("checkpoint", run.wandb_id),
        type="model",
        description=f"Checkpoint of step {manifest.step} of the run {run.id}.",
        metadata=_metadata(run, manifest, None if is_upload else mirror_url),
    )
    for name, entry in manifest.files.items():
        if is_upload:
            # Neither copied to the staging directory of W&B nor into its cache.
            artifact.add_file(str(folder / name), name, policy="immutable", skip_cache=True)
        elif mirror_url is None:
            artifact.add_reference((folder / name).absolute().as_uri(), name)
        else:
            _add_remote(artifact, f"{mirror_url}/{step_name(manifest.step)}/{name}", name, entry)
    for name, path in _copies(run.directory, folder).items():
        artifact.add_file(str(path), name, policy="immutable", skip_cache=True)
    return artifact


def clear_staging(run_directory: Path) -> None:
    """Removes the copies, also those of a process that was killed."""
    shutil.rmtree(run_directory / STAGING, ignore_errors=True)


def _add_remote(artifact: Any, url: str, name: str, entry: Mapping[str, Any]) -> None:
    """Adds a reference without access to the storage, for which W&B's client would need drivers
    and credentials of its own. A mirror has a file in parts, whose names begin with ``url``."""
    from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry

    artifact.manifest.add_entry(
        ArtifactManifestEntry(path=name, ref=url, digest=entry["sha256"], size=entry["size"])
    )


def _copies(run: Path, checkpoint: Path) -> dict[str, Path]:
    """Copies what may change; returns the copies by their names in the artifact."""
    staging = run / STAGING
    clear_staging(run)
    for directory in (run / "wandb", staging):
        refuse_link(directory)
    (staging / RUN).mkdir(parents=True)
    sources = {MANIFEST: checkpoint / MANIFEST}
    sources |= {f"{RUN}/{n}": run / n for n in RUN_FILES if (run / n).exists()}
    for name, source in sources.items():
        with (
            os.fdopen(open_regular(source), "rb") as read,
            os.fdopen(create(staging / name), "wb") as write,
        ):
            shutil.copyfileobj(read, write, _BLOCK)
    return {name: staging / name for name in sources}


def _metadata(run: RunInfo, manifest: Manifest, mirror_url: str | None) -> dict[str, Any]:
    metrics = {n: v for n, v in (manifest.metrics or {}).items() if math.isfinite(v)}
    return {
        "step": manifest.step,
        "metrics": metrics,
        "run": run.id,
        "attempt": manifest.state.get("attempt"),
        "config_sha256": json_sha256(run.config),
        "manifest_sha256": manifest.sha256,
        "content_sha256": content_digest(manifest),
        "size": sum(entry["size"] for entry in manifest.files.values()),
        **({"mirror": mirror_url} if mirror_url else {}),
    }
