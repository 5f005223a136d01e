"""The config's half of a launch: checked here and now, before anything is queued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.contract import UsageError


@dataclass(frozen=True)
class Training:
    """A training command, and what the launch has to know of it."""

    name: str
    run_directory: Path | None
    """None: it could not be known."""
    files: tuple[str, ...]
    overrides: tuple[str, ...]

    @property
    def config_arguments(self) -> list[str]:
        """``--config FILE ...``"""
        return [word for file in self.files for word in ("--config", file)]

    def command(self, *words: str) -> list[str]:
        """The command line of ``train``; ``words`` begin with the command."""
        return ["python", "-m", "train", *words, *self.config_arguments, *self.overrides]


def training(
    files: Sequence[str], overrides: Sequence[str], *, check: bool = True, world_size: int | None
) -> Training:
    """Validates the config by the training's own schema. Raises UsageError.

    Without ``check``, for files that are only in the image, nothing is read.
    """
    for word in overrides:
        if word.startswith("-"):
            raise UsageError(
                f"{word!r} stands after a key=value override, where only further ones may; put "
                "the component's options before them."
            )
    if not check:
        name = next((w.partition("=")[2] for w in overrides if w.startswith("run.name=")), "run")
        return Training(name, None, tuple(files), tuple(overrides))
    for file in files:
        if not Path(file).exists():
            raise UsageError(
                f"The config file {file!r} given by --config does not exist here ({Path.cwd()}), "
                "so it cannot be checked before it is submitted; give a path that is the same "
                "here and in the image, or submit it unchecked by --check False."
            )
    from launch.contract import check_config, load_config

    loaded = load_config(files, overrides, runs=False)
    check_config(loaded.config, loaded.composed, world_size or 1)
    return Training(loaded.config.run.name, loaded.run_directory, tuple(files), tuple(overrides))
