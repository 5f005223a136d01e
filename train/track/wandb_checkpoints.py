"""Sends checkpoints of a run to W&B as artifacts, each once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from train.checkpoint.checkpoint_config import MirrorConfig
from train.checkpoint.damage import DamagedError
from train.checkpoint.manifest import Manifest
from train.checkpoint.mirror import Mirror
from train.checkpoint.store import CheckpointStore
from train.track.sinks import RunInfo
from train.track.wandb_artifact import (
    checkpoint_artifact,
    clear_staging,
    collection_name,
    content_digest,
)
from train.track.wandb_sent import BEST, LATEST, Sent, SentCheckpoint, missing_steps
from train.track.watched_metric import PREFIX, watched_metric

_log = logging.getLogger("train")
_API_SECONDS = 15


class CheckpointSender:
    """Knows what W&B lacks of a run's checkpoints, and sends it. Not for several threads at once.

    ``mode`` is ``track.wandb_checkpoints``. ``store`` must be that of the process which writes the
    checkpoints, so that it keeps one while it is read.
    """

    def __init__(self, run: RunInfo, store: CheckpointStore, mode: str) -> None:
        self.run, self._store, self._mode = run, store, mode
        self._sent = Sent.read(run.directory)
        name, direction = watched_metric(run.config)
        self._rule = name.removeprefix(PREFIX), direction
        self._vanished: set[int] = set()
        self._mirror = _mirror(run.config) if mode == "reference" else None

    def missing(self, *, ended: bool) -> list[int]:
        """The steps to send, newest first; ``ended``: whether the run has."""
        local = self._local()
        if self._mirror:  # what is not there yet cannot be referred to
            copied = set(self._mirror.steps())
            local = {step: metrics for step, metrics in local.items() if step in copied}
        steps = missing_steps(self._mode, local, self._sent, self._rule, ended=ended)
        return [step for step in steps if step not in self._vanished]

    @property
    def lacks_dataset(self) -> bool:
        """Whether the run's dataset is not its input yet."""
        fingerprint = self.run.facts.get("dataset", {}).get("fingerprint")
        return fingerprint is not None and fingerprint != self._sent.dataset

    def stale(self) -> dict[int, list[str]]:
        """The aliases of sent checkpoints that must change, as they should be, by step."""
        wanted = self._sent.aliases(self._rule, self._local())
        sent = self._sent.checkpoints
        return {s: names for s, names in wanted.items() if {*names} != {*sent[s].aliases}}

    def send_dataset(self, wandb_run: Any, *, seconds: int | None = None) -> None:
        """Declares the dataset as the input of the W&B run; waits at most ``seconds``. Raises an
        exception of W&B, or OSError."""
        import wandb

        dataset = self.run.facts["dataset"]
        fingerprint = dataset["fingerprint"]
        artifact = wandb.Artifact(
            collection_name("dataset", fingerprint),
            type="dataset",
            description="What a run of isorun was trained on, without the data.",
            metadata={**dataset, "task": (self.run.config.get("task") or {}).get("use")},
        )
        wandb_run.log_artifact(artifact)  # use_artifact alone would wait without a limit
        wandb_run.use_artifact(artifact.wait(timeout=seconds))
        self._sent.dataset = fingerprint
        self._sent.save()

    def send(self, wandb_run: Any, step: int, *, seconds: int | None = None) -> bool:
        """Sends one checkpoint and waits for it, at most ``seconds``; False if it is not there any
        more or damaged. Raises an exception of W&B, or OSError."""
        try:
            with self._store.pinned(step):
                return self._send(wandb_run, step, seconds)
        except (FileNotFoundError, DamagedError) as error:
            self._vanished.add(step)
            if self._store.path(step).exists():
                _log.warning("The checkpoint of step %d is not sent to W&B: %s.", step, error)
            return False
        finally:
            clear_staging(self.run.directory)

    def _send(self, wandb_run: Any, step: int, seconds: int | None) -> bool:
        started = time.monotonic()
        manifest = Manifest.read(self._store.path(step))
        local = [*self._local(), step]
        aliases = self._sent.aliases(self._rule, local, step, manifest.metrics)[step]
        is_doubtful = self._sent.is_doubtful or self._sent.begun == step
        artifact = self._found(wandb_run, manifest) if is_doubtful else None
        if artifact is None:
            by = "reference" if self._mode == "reference" else "upload"
            url = self._mirror.url if self._mirror else None
            artifact = checkpoint_artifact(self.run, self._store, manifest, url, by)
            self._sent.begun = step
            self._sent.save()
            wandb_run.log_artifact(artifact, aliases=aliases)
            artifact.wait(timeout=seconds)
            # W&B's client adds it to what is logged last; update_aliases gives it back.
            aliases = list(dict.fromkeys([*aliases, LATEST]))
        else:
            aliases = [name for name in artifact.aliases if name in (*aliases, LATEST, BEST)]
        for other in self._sent.checkpoints.values():  # W&B has moved them
            other.aliases = [a for a in other.aliases if a not in aliases]
        self._sent.begun = None
        self._sent.checkpoints[step] = SentCheckpoint(
            content_digest(manifest), artifact.source_qualified_name, manifest.metrics, aliases
        )
        self._sent.save()
        took = time.monotonic() - started
        name = artifact.source_qualified_name
        _log.info("the checkpoint of step %d is in W&B after %.1f s: %s", step, took, name)
        return True

    def _found(self, wandb_run: Any, manifest: Manifest) -> Any:
        """The artifact of an upload that ended before it was remembered; None without one."""
        name = collection_name("checkpoint", self.run.wandb_id)
        path = f"{wandb_run.entity}/{wandb_run.project}/{name}:step-{manifest.step}"
        found = _artifact(_api(wandb_run), path)
        digest = found.metadata.get("content_sha256") if found else None
        return found if digest == content_digest(manifest) else None

    def update_aliases(self, wandb_run: Any) -> None:
        """Moves ``latest`` and ``best``, and removes ``step-N`` where the checkpoint is not in the
        run directory any more. Aliases of others stay. Raises an exception of W&B."""
        api = None
        # Those that lose an alias come last: it must not be taken from its new owner.
        for step, wanted in sorted(self.stale().items(), reverse=True):
            api = api or _api(wandb_run)
            sent = self._sent.checkpoints[step]
            if artifact := _artifact(api, sent.artifact):  # somebody may have removed it
                others = [name for name in artifact.aliases if name not in sent.aliases]
                artifact.aliases = list(dict.fromkeys([*others, *wanted]))
                artifact.save()
            for other in self._sent.checkpoints.values():
                other.aliases = [a for a in other.aliases if a not in wanted]
            sent.aliases = wanted
            self._sent.save()
        local = self._local()
        self._sent.checkpoints = {
            step: sent
            for step, sent in self._sent.checkpoints.items()
            if sent.aliases or step in local  # the others cannot be sent again
        }

    def _local(self) -> dict[int, dict[str, float] | None]:
        """The metrics of the checkpoints in the run directory, by step. Forgets that one was sent
        if the run has made another of the same step, because the first was damaged."""
        local: dict[int, dict[str, float] | None] = {}
        for step in self._store.steps():
            local[step] = None
            with suppress(DamagedError):
                manifest = Manifest.read(self._store.path(step))
                local[step] = manifest.metrics
                sent = self._sent.checkpoints.get(step)
                if sent and sent.content != content_digest(manifest):
                    del self._sent.checkpoints[step]
        return local


def send_missing(
    sender: CheckpointSender, wandb_run: Any, say: Callable[[str], None], *, seconds: int
) -> None:
    """Sends all that W&B lacks of a run that does not run, in the order of steps; ``seconds``
    limits the upload of each checkpoint. Raises an exception of W&B, or OSError."""
    if sender.lacks_dataset:
        sender.send_dataset(wandb_run, seconds=seconds)
    for step in reversed(sender.missing(ended=True)):
        if sender.send(wandb_run, step, seconds=seconds):
            say(f"{sender.run.id}: sent the checkpoint of step {step}.")
    sender.update_aliases(wandb_run)  # each was the newest of all so far


def _api(wandb_run: Any) -> Any:
    import wandb

    overrides = {"entity": wandb_run.entity, "project": wandb_run.project}
    return wandb.Api(overrides=overrides, timeout=_API_SECONDS)


def _artifact(api: Any, path: str) -> Any:
    """An artifact of W&B; None if there is none. Raises an exception of W&B if it fails."""
    try:
        return api.artifact(path)
    except Exception as error:
        if isinstance(getattr(error, "exc", error), ValueError):
            return None
        raise


def _mirror(config: dict[str, Any]) -> Mirror | None:
    values = (config.get("checkpoint") or {}).get("mirror")
    return Mirror(MirrorConfig.model_validate(values)) if values else None
