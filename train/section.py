"""The base class of config sections, and the mark of fields that cannot change results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticKnownError

_NON_SEMANTIC = "changes_results"


class Section(BaseModel):
    """A part of the config. Unknown keys and values of another type are errors; values are frozen.

    Each component defines a subclass beside its code. The string literal below a field is its
    description in the JSON schema.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


def non_semantic(
    default: Any, *, json_schema_extra: Mapping[str, Any] | None = None, **constraints: Any
) -> Any:
    """A field that may change when a run is resumed, because it cannot change results.

    Takes the arguments of ``pydantic.Field``. A change of any other field refuses the resume.
    """
    extra: dict[str, Any] = {**(json_schema_extra or {}), _NON_SEMANTIC: False}
    return Field(default, json_schema_extra=extra, **constraints)


def changes_results(extra: Any) -> bool:
    """Whether a field with this ``json_schema_extra`` can change results."""
    return not (isinstance(extra, dict) and extra.get(_NON_SEMANTIC) is False)


def name_or_path(value: str, names: Sequence[str], form: str) -> str:
    """``value``, if it is a built-in name or a dotted path; for validators of fields.

    Otherwise raises the error of a Literal, so that the message lists the choices and the closest
    one. ``form`` is the form of the path, such as "module.path:function".
    """
    if value in names or ":" in value:
        return value
    raise PydanticKnownError("literal_error", {"expected": ", ".join([*names, form])})


def names_for_editors(names: Sequence[str]) -> dict[str, Any]:
    """The same rule as JSON schema, so that editors complete the names."""
    return {"anyOf": [{"enum": list(names)}, {"pattern": ":"}]}
