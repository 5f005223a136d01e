"""The form of the loop's state in a manifest, which is checked before any of it is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from train.json_files import Fields, has_fields, is_number, shown

_NUMBER = (int, float)
_NONE = type(None)
_REQUIRED: Fields = {"progress": dict, "window": dict, "samples": int, "optimizer": dict}
_OPTIONAL: Fields = {
    "run": (str, _NONE), "attempt": (int, _NONE), "seed": (int, _NONE), "batch": (int, _NONE),
    "early_stop": (dict, _NONE), "loss_scale": (dict, _NONE), "extra_state": (dict, _NONE),
    "optim": (dict, _NONE), "optimizer_groups": list, "spikes": (dict, _NONE),
}  # fmt: skip
_PROGRESS: Fields = {
    "step": int, "position": int, "skipped_steps": int, "skipped_in_a_row": int, "spikes": int,
    "evaluated": dict, "evaluated_step": (int, _NONE), "evaluation_due": bool,
}  # fmt: skip
_PARTS: Mapping[str, Fields] = {
    "window": {"loss_sum": _NUMBER, "count": _NUMBER, "norm": (int, float, _NONE)},
    "early_stop": {"best": (int, float, _NONE), "waited": int, "stopped": bool},
    "loss_scale": {"value": _NUMBER, "steps_since": int},
    "optim": {"use": str, "options": dict},
    "spikes": {"loss": list, "norm": list},
}


def state_fault(state: Mapping[str, Any]) -> str | None:
    """The first value of the state that is missing or of another type, to end a sentence with."""
    return next(_faults(state), None)


def _faults(state: Mapping[str, Any]) -> Iterator[str]:
    yield from _wrong("", state, _REQUIRED)
    yield from _wrong("", state, _present(state, _OPTIONAL))
    for part, fields in _PARTS.items():
        if state.get(part):
            yield from _wrong(f"{part}.", state[part], fields)
    progress = state["progress"]
    yield from _wrong("progress.", progress, _present(progress, _PROGRESS))
    evaluated = progress.get("evaluated", {})
    yield from _wrong("progress.evaluated.", evaluated, dict.fromkeys(evaluated, _NUMBER))
    spikes = state.get("spikes") or {"loss": [], "norm": []}
    if not all(is_number(value) for value in (*spikes["loss"], *spikes["norm"])):
        yield "spikes that are not numbers"
    if not all(isinstance(group, dict) for group in state.get("optimizer_groups", [])):
        yield "optimizer_groups that are not objects"


def _present(values: Mapping[str, Any], fields: Fields) -> Fields:
    return {name: kind for name, kind in fields.items() if name in values}


def _wrong(prefix: str, values: Mapping[str, Any], fields: Fields) -> Iterator[str]:
    for name, kind in fields.items():
        is_of_kind = has_fields(values, {name: kind})
        if not is_of_kind or (type(values[name]) is int and not is_number(values[name])):
            yield f"{prefix}{name} {shown(values.get(name))}"
