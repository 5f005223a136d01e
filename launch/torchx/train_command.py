"""The ``train`` command of a launch, with its config checked before anything is submitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.contract import TRAIN, UsageError


@dataclass(frozen=True)
class TrainCommand:
    """A command of ``train``, and what the launch needs to know of its config."""

    name: str
    """run.name"""
    run_directory: Path | None
    """None if the config was not read."""
    files: tuple[str, ...]
    overrides: tuple[str, ...]

    @property
    def config_arguments(self) -> list[str]:
        """``--config FILE ...``"""
        return [word for file in self.files for word in ("--config", file)]

    def words(self, command: str, *options: str) -> list[str]:
        """The command line."""
        return ["python", *TRAIN, command, *options, *self.config_arguments, *self.overrides]


def train_command(
    files: Sequence[str], overrides: Sequence[str], *, check: bool = True, world_size: int | None
) -> TrainCommand:
    """Validates the config with the schema of ``train``. Raises UsageError.

    With ``check=False`` no file is read: they may exist in the image only.
    """
    for word in overrides:
        if word.startswith("-"):
            raise UsageError(
                f"The option {word!r} comes after a key=value override; put the component's "
                "options before the overrides."
            )
    if not check:
        name = next((w.partition("=")[2] for w in overrides if w.startswith("run.name=")), "run")
        return TrainCommand(name, None, tuple(files), tuple(overrides))
    for file in files:
        if not Path(file).exists():
            raise UsageError(
                f"The config file {file!r} (--config) does not exist in {Path.cwd()}, so it cannot "
                "be checked before it is submitted; use a path that is valid here and in the "
                "image, or pass --check False."
            )
    from launch.contract import check_config, load_config

    loaded = load_config(files, overrides, runs=False)
    check_config(loaded.config, loaded.composed, world_size or 1)
    return TrainCommand(
        loaded.config.run.name, loaded.run_directory_as_set, tuple(files), tuple(overrides)
    )
