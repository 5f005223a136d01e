"""Which tensors of a source of weights a model takes: by name, shape and kind of dtype."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from train.suggest import listed

_FLOATS = {"float64", "float32", "float16", "bfloat16"}
"""They are converted to each other. Smaller ones need scales, which a source has beside them."""


class Entry(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: str
    """The name in torch, such as ``float32``."""


@dataclass(frozen=True)
class Match:
    """How the tensors of a source compare with those of a model."""

    used: dict[str, str]
    """The name in the source by the name in the model."""
    missing: list[str]
    """Names of the model that the source lacks."""
    unexpected: list[str]
    """Names of the source that the model lacks."""
    other: list[str]
    """Tensors of another shape or dtype, each with both."""
    tied: list[tuple[str, str, str]]
    """One tensor of the model for which the source has two names: the name in the model, and those
    in the source, of which the first is used."""
    hint: str
    """A sentence on a prefix that would make more names match; empty without one."""

    @property
    def is_complete(self) -> bool:
        """Whether the names, shapes and dtypes are those of the model."""
        return not (self.missing or self.unexpected or self.other)

    def lines(self, most: int) -> list[str]:
        """The differences by kind, one kind a line, each with at most ``most`` names."""
        kinds = {
            "missing in the source": self.missing,
            "unexpected in the source": self.unexpected,
            "other shape or dtype": self.other,
        }
        lines = [
            f"  {kind} ({len(names)}): {listed(names, most)}"
            for kind, names in kinds.items()
            if names
        ]
        return [*lines, f"  {self.hint}"] if self.hint else lines


def compare(
    model: Mapping[str, Entry], names: Mapping[str, Sequence[str]], source: Mapping[str, Entry]
) -> Match:
    """Compares the tensors of a model with those of a source. ``names`` are all names of each
    tensor of the model: a source may have a shared tensor under any of them."""
    used: dict[str, str] = {}
    missing, other, tied, known = [], [], [], set()
    for name, entry in model.items():
        found = [own for own in names.get(name, [name]) if own in source]
        known.update(found)
        if not found:
            missing.append(name)
            continue
        fits = [own for own in found if not _difference(entry, source[own])]
        if len(fits) < len(found):
            wrong = next(own for own in found if own not in fits)
            other.append(f"{wrong} ({_difference(entry, source[wrong])})")
        if fits:
            used[name] = fits[0]
            tied += [(name, fits[0], second) for second in fits[1:]]
    unexpected = [name for name in source if name not in known]
    hint = _prefix_hint(model, missing, source, unexpected)
    return Match(used, missing, unexpected, other, tied, hint)


def _difference(model: Entry, source: Entry) -> str:
    """How a tensor of the source differs from that of the model; empty where it can be loaded."""
    if model.shape != source.shape:
        return f"shape {source.shape} in the source, {model.shape} in the model"
    if model.dtype != source.dtype and not {model.dtype, source.dtype} <= _FLOATS:
        return f"{source.dtype} in the source, {model.dtype} in the model"
    return ""


def _prefix_hint(
    model: Mapping[str, Entry],
    missing: Iterable[str],
    source: Mapping[str, Entry],
    unexpected: Iterable[str],
) -> str:
    """The prefix by which the most of the names differ, if the shapes are the same."""
    missing, unexpected = set(missing), set(unexpected)

    def prefixes(longer: Iterable[str], shorter: set[str]) -> Counter[str]:
        found: Counter[str] = Counter()
        for name in longer:
            parts = name.split(".")
            for cut in range(1, len(parts)):
                rest = ".".join(parts[cut:])
                if rest in shorter:
                    one, two = (name, rest) if name in source else (rest, name)
                    if one in source and source[one].shape == model[two].shape:
                        found[name.removesuffix(rest)] += 1
                    break
        return found

    remove, add = prefixes(unexpected, missing), prefixes(missing, unexpected)
    most = max(remove.values(), default=0), max(add.values(), default=0)
    if not max(most):
        return ""
    prefix = (remove if most[0] >= most[1] else add).most_common(1)[0][0]
    how = "without" if most[0] >= most[1] else "with"
    where = "in" if most[0] >= most[1] else "before"
    return (
        f"{max(most)} more would match {how} the prefix {prefix!r} {where} the names of the "
        "source; if they are the same tensors, save them under the names of the model."
    )
