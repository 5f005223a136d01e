"""Which checkpoints of a run W&B has, remembered in the run directory, and which it still needs."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from train.files import write_json
from train.json_files import Fields, has_fields, is_number, read_object
from train.json_text import finite

FILE = "wandb_checkpoints.json"
LATEST, BEST = "latest", "best"
_log = logging.getLogger("train")
_FIELDS: Fields = {"dataset": (str, type(None)), "begun": list, "checkpoints": dict}
_ENTRY: Fields = {
    "content": str, "artifact": str, "metrics": (dict, type(None)), "aliases": list,
}  # fmt: skip


@dataclass
class SentCheckpoint:
    """A checkpoint that W&B has."""

    content: str
    """SHA-256 of the list of its files, by which it is recognised."""
    artifact: str
    """``entity/project/name:version``."""
    metrics: dict[str, float] | None
    """The evaluation of its step, if there was one."""
    aliases: list[str]
    """Those of ``latest``, ``best`` and ``step-N`` that it has."""


@dataclass
class Sent:
    """What W&B has of one run. ``save`` writes it to the run directory."""

    path: Path
    dataset: str | None = None
    """The fingerprint of the dataset that is an input of the W&B run."""
    begun: list[int] = field(default_factory=list)
    """The steps of uploads that have begun; W&B may have them although they are not in
    ``checkpoints``."""
    checkpoints: dict[int, SentCheckpoint] = field(default_factory=dict)
    is_doubtful: bool = field(default=False, compare=False)
    """Whether W&B may have any checkpoint although it is not in ``checkpoints``."""

    @classmethod
    def read(cls, run_directory: Path) -> Sent:
        """Reads the file of a run directory; without one, or with a damaged one, W&B is asked
        again before anything is sent."""
        path = run_directory / FILE
        try:
            values = read_object(path, _FIELDS)
            checkpoints = {
                int(step): SentCheckpoint(**{name: entry[name] for name in _ENTRY})
                for step, entry in values["checkpoints"].items()
                if has_fields(entry, _ENTRY) and all(isinstance(a, str) for a in entry["aliases"])
            }
        except FileNotFoundError:
            return cls(path, is_doubtful=True)
        except (OSError, ValueError) as error:
            _log.info("%s cannot be read: %s", path, error)
            return cls(path, is_doubtful=True)
        return cls(path, values["dataset"], values["begun"], checkpoints)

    def save(self) -> None:
        """Replaces the file. Raises OSError."""
        write_json(
            self.path,
            {
                "dataset": self.dataset,
                "begun": self.begun,
                "checkpoints": {
                    str(s): finite(asdict(c)) for s, c in sorted(self.checkpoints.items())
                },
            },
        )

    def aliases(
        self, rule: tuple[str, str], local: Iterable[int], step: int | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> dict[int, list[str]]:  # fmt: skip
        """The aliases that each sent checkpoint should have, and the one of ``step``, which is
        about to be sent: ``latest`` for the newest, ``best`` for the best by ``rule`` (metric, and
        min or max), ``step-N`` for those that are in the run directory (``local``)."""
        known = {s: sent.metrics for s, sent in self.checkpoints.items()}
        kept = {*local}
        if step is not None:
            known[step] = dict(metrics) if metrics else None
            kept.add(step)
        best = best_step(known, rule)
        return {
            s: [
                *([LATEST] if s == max(known) else []),
                *([BEST] if s == best else []),
                *([f"step-{s}"] if s in kept else []),
            ]
            for s in known
        }


def best_step(metrics: Mapping[int, Mapping[str, Any] | None], rule: tuple[str, str]) -> int | None:
    """The step with the best finite value, the newer one if equal; None without one."""
    name, mode = rule
    sign = -1.0 if mode == "max" else 1.0
    values = {}
    for step, found in metrics.items():
        value = (found or {}).get(name)
        if is_number(value) and math.isfinite(value):
            values[step] = sign * value
    return min(values, key=lambda step: (values[step], -step)) if values else None


def missing_steps(
    mode: str,
    local: Mapping[int, Mapping[str, Any] | None],
    sent: Sent,
    rule: tuple[str, str],
    *,
    ended: bool,
) -> list[int]:
    """The steps that W&B lacks, newest first.

    ``mode`` is ``track.wandb_checkpoints``; ``local`` has the metrics of the checkpoints in the run
    directory. With ``best``, the newest is wanted only once the run has ``ended``.
    """
    if mode == "best":
        known = {step: entry.metrics for step, entry in sent.checkpoints.items()}
        best = best_step({**known, **local}, rule)
        wanted = {best, max(local)} if ended and local else {best}
    else:
        wanted = {*local}
    return [s for s in sorted(local, reverse=True) if s in wanted and s not in sent.checkpoints]
