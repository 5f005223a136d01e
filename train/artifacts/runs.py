"""Artifacts of W&B in place of a run directory, for the commands that use its checkpoints."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from train.artifacts.name import PREFIX, PROJECT, is_artifact, parse_name
from train.artifacts.restore import restore_artifact
from train.checkpoint.store import CheckpointStore

_CONFIG = "config.json"


@dataclass
class ReceivedRuns:
    """Run directories that were made from artifacts, for as long as the command runs."""

    artifacts: dict[str, str] = field(default_factory=dict)
    """The artifact, ``wandb:entity/project/name:version``, by run directory."""

    def name_of(self, checkpoint: Path) -> str | None:
        """The artifact that a checkpoint came from; None for a local one."""
        return self.name_of_run(checkpoint.absolute().parents[1])

    def name_of_run(self, directory: Path) -> str | None:
        """The artifact that a run directory came from; None for a local one."""
        return self.artifacts.get(str(directory))


@contextmanager
def received_runs(
    files: Sequence[str], checkpoint: str, overrides: Sequence[str]
) -> Iterator[tuple[list[str], str, ReceivedRuns]]:
    """Downloads the artifacts among ``files``, the configs of a command, and that of
    ``--checkpoint``, into temporary directories. Yields both with directories in their place.

    The project and the entity of a name that has none are those of the overrides ``track.*``.
    Raises what :func:`train.artifacts.restore.restore_artifact` raises.
    """
    received = ReceivedRuns()
    set_values = dict(override.split("=", 1) for override in overrides)
    project = set_values.get("track.wandb_project", PROJECT)
    entity = set_values.get("track.wandb_entity")
    with ExitStack() as stack:

        def place(text: str, where: str, needs: Sequence[str] = ()) -> tuple[str, int]:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="isorun-"))
            run = Path(folder).resolve() / "run"
            run.mkdir(mode=0o700)
            name = parse_name(text, where, project=project, entity=entity)
            restored = restore_artifact(name, run, Path(folder) / "wandb", where, needs=needs)
            received.artifacts[str(run)] = f"{PREFIX}{restored.artifact}"
            return str(run), restored.step

        found = [
            place(text, f"The run is {text!r}", [_CONFIG])[0] if is_artifact(text) else text
            for text in files
        ]
        if is_artifact(checkpoint):
            run, step = place(checkpoint, f"--checkpoint is {checkpoint!r}")
            checkpoint = str(CheckpointStore(Path(run) / "checkpoints").path(step))
        yield found, checkpoint, received
