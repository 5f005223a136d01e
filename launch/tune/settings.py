"""What decides the trials of a study, and ``study.json``, its record in the study's directory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.contract import (
    Fields,
    LoadedConfig,
    ResumeRefusedError,
    Space,
    UsageError,
    config_differences,
    did_you_mean,
    first_line,
    listed,
    read_object,
    redact,
    watched_metric,
    write_json,
)

STUDY_FILE = "study.json"
_FIELDS: Fields = {
    "name": str, "created": (int, float), "storage": str, "space": dict, "objectives": list,
    "sampler": str, "pruner": str, "seed": int, "config": dict,
}  # fmt: skip
_MODES = ("min", "max")
_LESS = {
    "loss", "error", "perplexity", "entropy", "byte", "mae", "mse", "rmse", "wer", "cer", "fid",
}  # fmt: skip
_MORE = {
    "accuracy", "acc", "f1", "auc", "auroc", "precision", "recall", "bleu", "rouge", "map", "iou",
    "dice", "psnr", "ssim", "score", "r2", "reward",
}  # fmt: skip


@dataclass(frozen=True)
class Objective:
    """An evaluation metric, by its name without ``eval/``."""

    name: str
    mode: str
    """min or max."""

    def __str__(self) -> str:
        return f"{self.name}:{self.mode}"


@dataclass(frozen=True)
class Settings:
    """What decides which trials a study makes; the same for all processes that work on it."""

    space: Space
    objectives: tuple[Objective, ...]
    sampler: str
    pruner: str
    base: LoadedConfig
    """The config with the first value of each key of the space."""

    @property
    def seed(self) -> int:
        """That of the runs, for the sampler too."""
        return int(self.base.config.run.seed)

    def to_json(self) -> dict[str, Any]:
        """For the record."""
        config = self.base.config.model_dump(mode="json")
        return {
            "space": dict(self.space.values),
            "objectives": [[each.name, each.mode] for each in self.objectives],
            "sampler": self.sampler,
            "pruner": self.pruner,
            "seed": self.seed,
            "config": config,
        }

    def changes(self, stored: Mapping[str, Any]) -> list[str]:
        """How these settings differ from stored ones, in ways that change results."""
        now = self.to_json()
        found = [
            f"{name}: {_shown(stored[name])} -> {_shown(now[name])}"
            for name in ("objectives", "sampler", "pruner", "seed")
            if now[name] != stored[name]
        ]
        for key in dict.fromkeys([*stored["space"], *now["space"]]):
            before, after = stored["space"].get(key), now["space"].get(key)
            if before != after:
                found.append(f"space: {key}: {_shown(before)} -> {_shown(after)}")
        found += [
            str(each)
            for each in config_differences(self.base.config, stored["config"])
            if each.changes_results and each.key not in self.space.values
        ]
        return found


def parse_objectives(words: Sequence[str], config: Mapping[str, Any]) -> tuple[Objective, ...]:
    """The objectives of ``NAME[:min|max]`` words; without any, the metric by which the config
    judges a run. Raises UsageError."""
    metric, mode = watched_metric(config)
    watched = Objective(metric.removeprefix("eval/"), mode)
    found: dict[str, Objective] = {}
    for word in words:
        name, colon, given = word.removeprefix("eval/").partition(":")
        if not name or (colon and given not in _MODES):
            hint = did_you_mean(given, _MODES) if given else "."
            raise UsageError(
                f"--objective is {word!r}, but must be the name of an evaluation metric, and "
                f"optionally :min or :max, such as accuracy:max{hint}"
            )
        if "," in name:
            raise UsageError(
                f"--objective is {word!r}, but names one metric; write one --objective for each."
            )
        mode = given or (watched.mode if name == watched.name else _known_mode(name))
        if not mode:
            raise UsageError(
                f"--objective is {word!r}, of which it is not known whether less or more is "
                f"better; write {name}:min or {name}:max."
            )
        if name in found:
            raise UsageError(f"--objective {name} is given twice; remove one of them.")
        found[name] = Objective(name, mode)
    return tuple(found.values()) or (watched,)


def _known_mode(name: str) -> str:
    """min or max by the words of a name; empty if they do not say."""
    words = set(name.lower().replace("/", "_").replace("-", "_").split("_"))
    words |= {word.rstrip("0123456789") for word in words} - {""}
    words |= {word.removesuffix("s") for word in words}
    less, more = bool(words & _LESS), bool(words & _MORE)
    return "" if less == more else "min" if less else "max"


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record of the study in a directory; None without one. Raises ResumeRefusedError for a
    damaged one."""
    path = directory / STUDY_FILE
    if not path.exists():
        return None
    try:
        return read_object(path, _FIELDS)
    except (OSError, ValueError) as error:
        raise ResumeRefusedError(
            f"{path} is damaged ({first_line(error)}); restore it from a backup, or choose "
            "another run.dir for a new study."
        ) from None


def write_record(
    directory: Path,
    settings: Settings,
    name: str,
    storage: str,
    created: float | None = None,
    *,
    sweep: str | None,
) -> None:
    """Writes the record of a study, without the secrets of its storage's URL. ``sweep``: that of
    W&B, as ENTITY/PROJECT/ID."""
    record = {
        "name": name,
        "created": created or time.time(),
        "storage": redact(storage),
        **({"wandb_sweep": sweep} if sweep else {}),
        **settings.to_json(),
    }
    write_json(directory / STUDY_FILE, record)


def refuse_changes(
    directory: Path, settings: Settings, record: Mapping[str, Any], *, may_rename: bool
) -> None:
    """Raises ResumeRefusedError if the settings are not those of the study. ``may_rename``: whether
    objectives may have other names, since no trial has reported one."""
    changes = settings.changes(record)
    modes = [mode for _, mode in record["objectives"]]
    if may_rename and modes == [each.mode for each in settings.objectives]:
        changes = [change for change in changes if not change.startswith("objectives: ")]
    if changes:
        raise ResumeRefusedError(
            f"The study in {directory} has other settings ({listed(changes, separator='; ')}), and "
            "its trials could not be compared; undo the changes, or choose another run.dir for a "
            "new study."
        )


def _shown(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
