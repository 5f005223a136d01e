"""Merges YAML files and ``key=value`` overrides, and records where each value was set."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.checkpoint.init_from_config import InitFromConfig
from train.config.leaves import leaves, shown_path, value_at
from train.config.no_secrets import check_no_secrets
from train.config.scalars import misleading, refuse_large_numbers, unreadable
from train.exits import UsageError, first_line

DEFAULT = "default"
COMMAND_LINE = "command line"
_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")
_UNREADABLE = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError)
"""What PyYAML raises for a scalar that has not the form of its tag."""
SHORT_FORMS = {"init_from": InitFromConfig.short_field}
"""Sections that a text alone stands for, and the key in them that it sets. It is expanded before
the merge, so that ``init_from=PLACE init_from.strict=false`` keeps the place."""
_ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*([A-Za-z_]\w*)")


@dataclass(frozen=True)
class Part:
    """What one file or override sets, before ``${...}`` is resolved."""

    name: str
    values: Any
    is_stored: bool = False
    """Whether it is the stored config of a run, which a command or another process has written."""


@dataclass(frozen=True)
class Composed:
    """Values as nested plain containers, and the place where each dotted key was last set."""

    values: dict[str, Any]
    origins: dict[str, str] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()

    def origin(self, key: str) -> str:
        """Where ``key`` was set; else where a key below it, or the list that holds it, was set;
        else "default"."""
        if key in self.origins:
            return self.origins[key]
        below = [o for k, o in self.origins.items() if k.startswith(key + ".")]
        if below:
            return below[-1]
        value: Any = self.values
        parts = key.split(".")
        for depth, part in enumerate(parts):
            if not isinstance(value, Mapping):
                return self.origin(".".join(parts[:depth]))
            value = value.get(part)
        return DEFAULT

    def where(self, key: str) -> str:
        """The origin as part of a sentence: "from FILE:LINE", or "default"."""
        origin = self.origin(key)
        return origin if origin == DEFAULT else f"from {origin}"


def placed(composed: Composed, places: Mapping[str, str]) -> Composed:
    """The same values, of which overrides of some keys have another origin than the command
    line."""
    moved = {
        key: place
        for key, origin in composed.origins.items()
        for name, place in places.items()
        if origin == COMMAND_LINE and f"{key}.".startswith(f"{name}.")
    }
    return replace(composed, origins={**composed.origins, **moved})


def compose(
    files: Sequence[str], overrides: Sequence[str], stored: Collection[str] = ()
) -> Composed:
    """Merges the files in order, then the overrides; a later value replaces an earlier one.

    ``${...}`` refers to other values, ``${oc.env:NAME}`` to the environment. ``stored``: those of
    the files that are stored configs of runs, which are resolved and so have no ``${...}``. Raises
    UsageError for a file that cannot be read or parsed, a malformed override, an unknown reference
    or a secret.
    """
    try:
        return _compose(files, overrides, stored)
    except RecursionError:
        raise UsageError(
            f"The config of {', '.join([*files, *overrides])[:200]} is nested too deeply; name a "
            "config file of isorun."
        ) from None


def _compose(files: Sequence[str], overrides: Sequence[str], stored: Collection[str]) -> Composed:
    merged = OmegaConf.create()
    origins: dict[str, str] = {}
    parts = []
    for name in files:
        text = _read(name)
        parsed = _parse(text, name)
        merged = _merge(merged, parsed, name)
        parts.append(Part(name, OmegaConf.to_container(parsed, resolve=False), name in stored))
        origins = _without_replaced(origins, parts[-1].values)
        origins.update((key, f"{name}:{line}") for key, line in _lines(text))
    for override in map(_expanded, overrides):
        key, text = _override_key(override), override.partition("=")[2]
        try:
            comment = _comment(text)
            part = OmegaConf.from_dotlist([override])
            refuse_large_numbers(OmegaConf.to_container(part, resolve=False))
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UsageError(
                f"The override {override[:200]!r} on the command line is not valid YAML after the "
                f"'=': {first_line(error)}; quote the value."
            ) from None
        except _UNREADABLE:
            _, fault = unreadable(text)
            raise UsageError(
                f"The override of {key} on the command line {fault}; correct the value, or quote "
                "it to make it a text."
            ) from None
        plain: Any = OmegaConf.to_container(part, resolve=False)
        _refuse_lost_text(override, text, comment, value_at(plain, tuple(key.split("."))))
        created = _created(OmegaConf.to_container(merged, resolve=False), key)
        merged = _merge(merged, part, f"The override {override!r} on the command line")
        parts.append(Part(COMMAND_LINE, OmegaConf.to_container(part, resolve=False)))
        origins = _without_replaced(origins, parts[-1].values)
        origins |= dict.fromkeys(created, COMMAND_LINE)
        origins |= {k: COMMAND_LINE for k, _ in _leaves(parts[-1].values) if k}
        origins[key] = COMMAND_LINE
    raw = OmegaConf.to_container(merged, resolve=False)
    _refuse_stored_references(parts, raw)
    for key, value in _leaves(raw):
        if isinstance(value, str) and (match := _ENVIRONMENT.search(value)):
            origins[key] = f"environment variable {match[1]}, by {origins.get(key, DEFAULT)}"
    try:
        values = OmegaConf.to_container(merged, resolve=True)
        refuse_large_numbers(values)
    except (OmegaConfBaseException, OverflowError) as error:
        key = str(getattr(error, "full_key", "") or "")
        where = f" at {key} (from {origins.get(key, DEFAULT)})" if key else ""
        raise UsageError(
            f"A reference{where} cannot be resolved: {first_line(error)}; "
            "set the key that it names, or write the value in its place."
        ) from None
    assert isinstance(raw, dict)
    assert isinstance(values, dict)
    raw, values = ({str(key): value for key, value in each.items()} for each in (raw, values))
    for path, value in leaves(raw):
        if isinstance(value, str) and "${" in value:  # it may have become a section
            key = ".".join(map(str, path))
            below = _leaves(value_at(values, path), key + ".")
            origins |= {k: origins[key] for k, _ in below if k != key and key in origins}
    composed = Composed(values, origins, tuple(parts))
    check_no_secrets(raw, values, lambda key: composed.where(key.partition("[")[0]))
    return composed


def _expanded(override: str) -> str:
    """An override of a short form as one of the key that it sets; others as they are."""
    key, _, text = override.partition("=")
    if key not in SHORT_FORMS:
        return override
    try:
        values: Any = OmegaConf.to_container(OmegaConf.from_dotlist([override]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, *_UNREADABLE):
        return override  # which is reported where it is merged
    return f"{key}.{SHORT_FORMS[key]}={text}" if isinstance(values[key], str) else override


def _without_replaced(origins: Mapping[str, str], part: Any) -> dict[str, str]:
    """The origins of what is left once ``part`` is merged: sections are merged key by key, other
    values replace the sections that were there."""
    replaced = tuple(
        f"{key}." for key, value in _leaves(part) if key and not isinstance(value, Mapping)
    )
    return {key: origin for key, origin in origins.items() if not key.startswith(replaced)}


def _refuse_stored_references(parts: Sequence[Part], raw: Any) -> None:
    """Raises UsageError for ``${...}`` from the stored config of a run."""
    for part in parts:
        for path, value in leaves(part.values) if part.is_stored else ():
            if isinstance(value, str) and "${" in value and value_at(raw, path) == value:
                key = shown_path(path)
                raise UsageError(
                    f"{key} in {part.name} has a reference (${{...}}), but the config of a run is "
                    f"stored with its values; set it yourself: add {key}=... to the command."
                )


def _read(name: str) -> str:
    path = Path(name)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(
            f"There is no config file or run directory {name!r}; correct the path, which is "
            f"relative to {Path.cwd()}."
        ) from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null in the name
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise UsageError(
            f"The config file {name!r} cannot be read ({reason}); correct the path or the file."
        ) from None


def _parse(text: str, name: str) -> Any:
    try:
        parsed = OmegaConf.create(text)
        if OmegaConf.is_dict(parsed):
            refuse_large_numbers(OmegaConf.to_container(parsed, resolve=False))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise UsageError(f"{name}{line} is not valid YAML: {problem}.") from None
    except OmegaConfBaseException as error:
        raise UsageError(f"{name} is not a valid config file: {first_line(error)}.") from None
    except _UNREADABLE:
        number, fault = unreadable(text)
        raise UsageError(
            f"{name}:{number} {fault}; correct the value, or quote it to make it a text."
        ) from None
    if not OmegaConf.is_dict(parsed) or (set(parsed) == {text.strip()} and ":" not in text):
        raise UsageError(
            f"{name} must contain keys and values (`run:`, `task:` ...) at the top level."
        )
    if wrong := misleading(text):
        raise UsageError(f"{name}:{wrong[0]} {wrong[1]}.")
    values: Any = OmegaConf.to_container(parsed, resolve=False)
    section: Any = parsed
    for key, inner in SHORT_FORMS.items():
        if isinstance(values.get(key), str):
            section[key] = {inner: values[key]}
    return parsed


def _merge(base: Any, part: Any, name: str) -> Any:
    try:
        return OmegaConf.merge(base, part)
    # OmegaConf raises a plain TypeError (2.4) or its own kind of TypeError (2.3).
    except TypeError:
        raise UsageError(
            f"{name} cannot be merged with the values before it: one is a list and the other a "
            "mapping; set a list as a whole, such as hooks=[module:Class]."
        ) from None
    except OmegaConfBaseException as error:
        raise UsageError(
            f"{name} cannot be merged with the values before it: {first_line(error)}."
        ) from None


def _comment(value: str) -> str:
    """What follows a value that YAML drops, since it starts with ``#``; usually empty."""
    ends = [
        token.end_mark.index
        for token in yaml.scan(value)
        if not isinstance(token, yaml.StreamStartToken | yaml.StreamEndToken | yaml.BlockEndToken)
    ]
    return value[max(ends, default=0) :].strip()


def _refuse_lost_text(override: str, text: str, comment: str, value: Any) -> None:
    """Raises UsageError where YAML drops what it takes for a comment, makes a line break a space,
    unless by ``>`` or ``|``, or reads a number that is not the one that is seen."""
    if wrong := misleading(text):
        raise UsageError(f"The override {override!r} on the command line {wrong[1]}.")
    if comment:
        raise UsageError(
            f"The override {override!r} on the command line has {comment!r} after its value, "
            "which YAML takes for a comment; quote the value once more, such as "
            "\"run.dir='a #b'\"."
        )
    folded = isinstance(value, str) and value.count("\n") < text.strip().count("\n")
    if folded and not text.lstrip().startswith((">", "|")):
        raise UsageError(
            f"The override {override!r} on the command line has a line break, which YAML takes for "
            "a space; quote the value once more, with \\n in double quotes."
        )


def is_key(text: str) -> bool:
    """Whether a text has the form of a dotted key."""
    return bool(_KEY.fullmatch(text))


def _override_key(override: str) -> str:
    key, equals, _ = override.partition("=")
    if not equals or not is_key(key):
        raise UsageError(
            f"The argument {override!r} on the command line is not of the form key=value, such "
            "as optim.lr=3e-4; name files with --config."
        )
    return key


def _created(values: Any, key: str) -> Iterator[str]:
    """The sections above a key that the values do not have, or have as another value."""
    parts = key.split(".")
    for depth, part in enumerate(parts[:-1], 1):
        values = values.get(part) if isinstance(values, Mapping) else None
        if not isinstance(values, Mapping):
            yield ".".join(parts[:depth])


def _lines(text: str) -> Iterator[tuple[str, int]]:
    """Each dotted key of a YAML text with its line number, from 1."""

    def walk(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int]]:
        if isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                key = f"{prefix}{key_node.value}"
                yield key, key_node.start_mark.line + 1
                if key in SHORT_FORMS and isinstance(value_node, yaml.ScalarNode):
                    yield f"{key}.{SHORT_FORMS[key]}", key_node.start_mark.line + 1
                yield from walk(value_node, key + ".")

    return walk(yaml.compose(text, Loader=yaml.SafeLoader), "")


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from _leaves(value, f"{prefix}{key}.")
    else:
        yield prefix[:-1], values


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys; lists are leaves."""
    return dict(_leaves(values))
