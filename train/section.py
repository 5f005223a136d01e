"""The base class of config sections, and the mark of fields that cannot change results."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticKnownError

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
        protected_namespaces=(),
    )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for name, text in _descriptions(cls).items():
            if name in properties:
                properties[name].setdefault("description", text)
        return schema


class ShortSection(Section):
    """A section that a text alone stands for: the value of its field ``short_field``."""

    short_field: ClassVar[str]
    short_form: ClassVar[str]
    """What the text is, for messages."""
    short_schema: ClassVar[Mapping[str, Any]] = {"minLength": 1}
    """What editors must know of the text, in JSON schema."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, str) and value:
            return {cls.short_field: value}
        if not isinstance(value, Mapping | ShortSection):
            fields = " and ".join(cls.model_fields)
            raise ValueError(f"{cls.short_form}, or a mapping with {fields}")
        return value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Either form, for editors."""
        section = super().__get_pydantic_json_schema__(core_schema, handler)
        return {"anyOf": [section, {"type": "string", **cls.short_schema}]}


def _descriptions(section: type[Section]) -> dict[str, str]:
    """Maps fields to the string literals below them, in the source code of a class and its bases.

    pydantic's ``use_attribute_docstrings`` does the same when a class is defined, at each start
    of a run: 0.2 s once torch is imported, because it searches all modules for the source code.
    """
    found = {}
    for base in reversed(section.__mro__):
        if not issubclass(base, Section):
            continue
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError):  # made by create_model, or defined in a notebook
            continue
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(value))):
                    found[name] = inspect.cleandoc(value)
    return found


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
