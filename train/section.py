"""The base class of every config section, and the mark for fields that cannot change results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticKnownError

_NON_SEMANTIC = "changes_results"


class Section(BaseModel):
    """A part of the config: unknown keys and loosely typed values are errors, values are frozen.

    Each component owns a subclass beside its code and documents every field by the string
    literal below it; these strings become the descriptions in the JSON schema.
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
    """A field that may differ when a run is resumed, because it cannot change the result.

    Takes what ``pydantic.Field`` takes. A field without this mark is compared on resume, and a
    difference is refused.
    """
    extra: dict[str, Any] = {**(json_schema_extra or {}), _NON_SEMANTIC: False}
    return Field(default, json_schema_extra=extra, **constraints)


def changes_results(extra: Any) -> bool:
    """Whether a field with this ``json_schema_extra`` is compared on resume."""
    return not (isinstance(extra, dict) and extra.get(_NON_SEMANTIC) is False)


def name_or_path(value: str, names: Sequence[str], form: str) -> str:
    """For a field's validator: ``value`` if it is one of the built-in names, or a dotted path.

    Raises the error of a Literal, so that the sentence names the choices and the closest one.
    ``form`` is how the path is written, such as "module.path:function".
    """
    if value in names or ":" in value:
        return value
    raise PydanticKnownError("literal_error", {"expected": ", ".join([*names, form])})


def names_for_editors(names: Sequence[str]) -> dict[str, Any]:
    """The same rule as JSON schema, so that editors complete the names."""
    return {"anyOf": [{"enum": list(names)}, {"pattern": ":"}]}
