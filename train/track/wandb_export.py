"""Logs an exported model to W&B as an artifact."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.checkpoint.manifest import Manifest
from train.checkpoint.run_directory import RunIdentity
from train.exits import RetryError, RunError, UsageError, first_line
from train.json_text import finite
from train.process.cleanup import temporary_directory
from train.track.track_config import TrackConfig
from train.track.wandb_artifact import collection_name, content_digest
from train.track.wandb_sent import LATEST, Sent
from train.track.wandb_sink import redacted_arguments

_INIT_SECONDS, _FINISH_SECONDS = 20.0, 30.0
_PATIENCE = 600
"""Seconds that an upload may take, besides one per megabyte."""
_PREFIX = "wandb-registry-"
_PART = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_REFUSED = re.compile(r"not found|permission|unable to|denied|\b40[134]\b", re.IGNORECASE)


def registry_path(text: str) -> str:
    """The path that W&B's client takes, for ``[ORGANISATION/]REGISTRY/COLLECTION``. Raises
    UsageError for a text of another form."""
    parts = text.split("/")
    if len(parts) not in (2, 3) or not all(map(_PART.fullmatch, parts)):
        raise UsageError(
            f"--registry is {text!r}, which does not name a collection in a registry of W&B; write "
            "REGISTRY/COLLECTION, such as model/digits, or ORGANISATION/REGISTRY/COLLECTION."
        )
    parts[-2] = _PREFIX + parts[-2].removeprefix(_PREFIX)
    return "/".join(parts)


def log_export(
    files: Sequence[Path],
    run_directory: Path,
    identity: RunIdentity,
    track: TrackConfig,
    manifest: Manifest,
    registry: str | None,
) -> str:
    """Logs the files of an export under a W&B run of the job type ``export``, whose input is the
    artifact of the checkpoint if W&B has it; links the artifact to ``registry``, a path of
    ``registry_path``. Returns ``entity/project/name:version``.

    Raises RetryError if W&B fails, UsageError for a registry that it refuses.
    """
    with temporary_directory("isorun-wandb-") as path:
        folder = str(path)
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR"):
            os.environ[name] = folder
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        try:
            return _log(
                wandb, str(folder), files, run_directory, identity, track, manifest, registry
            )
        except RunError:
            raise
        except Exception as error:
            raise RetryError(
                f"The export is in {files[0].parent}, but W&B did not take it "
                f"({first_line(error)}); rerun the command to try again."
            ) from error
        finally:
            wandb.teardown()


def _log(
    wandb: Any,
    folder: str,
    files: Sequence[Path],
    run_directory: Path,
    identity: RunIdentity,
    track: TrackConfig,
    manifest: Manifest,
    registry: str | None,
) -> str:
    settings = wandb.Settings(
        console="off", silent=True, init_timeout=_INIT_SECONDS, finish_timeout=_FINISH_SECONDS
    )
    size = sum(path.stat().st_size for path in files)
    with redacted_arguments():
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or track.wandb_project,
            entity=track.wandb_entity,
            name=f"{identity.name}, export of step {manifest.step}",
            group=os.environ.get("WANDB_RUN_GROUP") or track.wandb_group or identity.id,
            job_type="export",
            dir=folder,
            mode="online",
            settings=settings,
        )
    try:
        source = Sent.read(run_directory).checkpoints.get(manifest.step)
        if source and source.content == content_digest(manifest):
            run.use_artifact(source.artifact)
        artifact = wandb.Artifact(
            collection_name("model", identity.wandb_id),
            type="model",
            description=f"Export of step {manifest.step} of the run {identity.id}.",
            metadata={
                "step": manifest.step, "metrics": finite(manifest.metrics), "run": identity.id,
                "manifest_sha256": manifest.sha256, "size": size,
            },
        )  # fmt: skip
        for path in files:
            artifact.add_file(str(path), path.name, policy="immutable", skip_cache=True)
        run.log_artifact(artifact, aliases=[LATEST, f"step-{manifest.step}"])
        artifact.wait(timeout=_PATIENCE + size // 1_000_000)
        name = str(artifact.source_qualified_name)
        if registry:
            _link(artifact, registry, name)
    finally:
        run.finish()
    return name


def _link(artifact: Any, registry: str, name: str) -> None:
    try:
        artifact.link(registry)
    except Exception as error:
        if not _REFUSED.search(str(error)):
            raise
        raise UsageError(
            f"W&B has the export as {name}, but did not link it to --registry {registry} "
            f"({first_line(error)}); check the name and your rights there."
        ) from error
