"""Compares the config of a resumed run with its stored config."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel

from train.checkpoint.damage import damaged
from train.checkpoint.store import CheckpointStore
from train.config.compose import COMMAND_LINE
from train.exits import ResumeRefusedError
from train.section import changes_results

if TYPE_CHECKING:
    from train.checkpoint.run_directory import RunDirectory
    from train.config.compose import Composed
    from train.config.load import LoadedConfig


@dataclass(frozen=True)
class Difference:
    """A field whose value has changed."""

    key: str
    before: Any
    now: Any
    changes_results: bool

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} -> {self.now!r}"


def differences(config: BaseModel, stored: Mapping[str, Any]) -> list[Difference]:
    """All fields in which ``config`` differs from the values that an earlier attempt stored."""
    return list(_compare(config.model_dump(mode="json"), stored, type(config), "", True))


def stored_differences(
    now: Mapping[str, Any], before: Mapping[str, Any], model: type[BaseModel]
) -> list[Difference]:
    """All fields in which two stored configs differ; what one of them lacks has its default."""
    return list(_compare(with_defaults(now, model), with_defaults(before, model), model, "", True))


def with_defaults(values: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """A stored config with the fields that the version which stored it did not have."""
    found = dict(values)
    for name, info in model.model_fields.items():
        section, value = _submodel(info), found.get(name)
        if name not in found:
            found[name] = _default(info)
        elif section is not None and isinstance(value, Mapping):
            found[name] = with_defaults(value, section)
    return found


def _compare(
    now: Any, before: Any, model: type[BaseModel] | None, key: str, matters: bool
) -> list[Difference]:
    if isinstance(now, Mapping) and isinstance(before, Mapping):
        found = []
        for name in [*now, *(name for name in before if name not in now)]:
            info = model.model_fields.get(name) if model else None
            found += _compare(
                now.get(name),
                before[name] if name in before else _default(info),
                _submodel(info),
                f"{key}.{name}" if key else name,
                matters and (info is None or changes_results(info.json_schema_extra)),
            )
        return found
    return [] if now == before else [Difference(key, before, now, matters)]


def _default(info: Any) -> Any:
    """The default of a field that the stored config does not have yet."""
    if info is None or info.is_required():
        return None
    default = info.get_default(call_default_factory=True)
    return default.model_dump(mode="json") if isinstance(default, BaseModel) else default


def _submodel(info: Any) -> type[BaseModel] | None:
    """The section class of a field, optional or not."""
    candidates = (info.annotation, *get_args(info.annotation)) if info else ()
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def listed(changes: Iterable[Difference], composed: Composed) -> str:
    """The differences, one a line, with the origins of the new values."""
    return "\n".join(f"  {change} ({composed.origin(change.key)})" for change in changes)


def without_effect(
    loaded: LoadedConfig, stored: Mapping[str, Any], used: Collection[str]
) -> list[Difference]:
    """The overrides of the command line that a command does not use, and whose values are not those
    of the run's ``stored`` config; ``used``: the sections and fields that the command uses."""
    return [
        change
        for change in differences(loaded.config, stored)
        if loaded.composed.origin(change.key) == COMMAND_LINE
        and not any(f"{change.key}.".startswith(f"{key}.") for key in used)
    ]


def allowed_changes(
    loaded: LoadedConfig, directory: RunDirectory, *, allow: bool
) -> list[Difference]:
    """The differences between the config and that of the run's last attempt.

    Raises ResumeRefusedError if one of them changes results, unless ``allow``, or the directory has
    no checkpoint: then there is nothing to resume. With one, the stored config must be there.
    """
    stored, has_results = directory.stored_config(), _has_results(directory)
    if stored is None and has_results:
        raise damaged(directory.config_path, "it is missing")
    return checked_changes(loaded, stored, allow=allow or not has_results)


def checked_changes(
    loaded: LoadedConfig, stored: Mapping[str, Any] | None, *, allow: bool
) -> list[Difference]:
    """The differences between the config and ``stored``, if there is one. Raises
    ResumeRefusedError if one of them changes results, unless ``allow``."""
    if stored is None:
        return []
    changes = differences(loaded.config, stored)
    serious = [change for change in changes if change.changes_results]
    if serious and not allow:
        raise ResumeRefusedError(
            f"The run in {loaded.run_directory_as_set} last ran with another config, and these "
            f"differences change its results:\n{listed(serious, loaded.composed)}\n"
            "Undo them, choose another run.name or run.dir for a new run, or add --allow-changes "
            "to resume with them."
        )
    return changes


def _has_results(directory: RunDirectory) -> bool:
    steps = CheckpointStore(directory.checkpoints).steps()
    return bool(steps) or directory.finished() is not None
