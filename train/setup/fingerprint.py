"""A few values of what a run is made of, to tell whether two are the same: of its model, and of a
few samples of its data.

Values with fractions may differ up to ``_TOLERANCE``: machines of different kinds may round
differently.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from numbers import Number
from typing import Any, NamedTuple

import numpy as np
import torch

from train.data.loader import evaluation_batches
from train.data.loader_config import LoaderConfig
from train.data.plan import EvalPlan
from train.exits import RunError

_TOLERANCE = 1e-2
_VALUES = 8  # of each tensor
_SAMPLES = 3  # of each dataset
_STORED = 64  # parts of a dataset, in a checkpoint


class Part(NamedTuple):
    """What is compared of a tensor or of another value."""

    name: str
    exact: str
    """Type, shape, and a hash of values without fractions."""
    values: tuple[float, ...] = ()
    """Some values with fractions."""


class DataFingerprint:
    """The length of a dataset and a few of its samples; ``seed`` is that of the run. ``dataset``
    is None where there is no data."""

    def __init__(self, dataset: Any | None, seed: int, loader: LoaderConfig) -> None:
        self._dataset, self._seed, self._loader = dataset, seed, loader
        self.length = None if dataset is None else len(dataset)

    @cached_property
    def parts(self) -> list[Part]:
        """Empty where a sample cannot be read: the run may never need it."""
        return self._read()

    def is_stable(self) -> bool:
        """Reads the samples again: whether they are the same each time."""
        return first_difference(self.parts, self._read()) is None

    def to_json(self) -> list[Any]:
        """What a checkpoint has of the samples."""
        return [
            [
                part.name,
                part.exact,
                [value if math.isfinite(value) else None for value in part.values],
            ]
            for part in self.parts[:_STORED]
        ]

    def difference(self, stored: Any) -> str | None:
        """The name of the first part that is not as ``to_json`` stored it; None where all are, and
        for anything that this version does not store."""
        try:
            before = [
                Part(name, exact, tuple(map(_number, values))) for name, exact, values in stored
            ]
        except (TypeError, ValueError):
            return None
        now = [
            Part(name, exact, tuple(map(_number, values))) for name, exact, values in self.to_json()
        ]
        return first_difference(before, now)

    def _read(self) -> list[Part]:
        """By a worker where the run reads with workers: what a dataset opens when it is first read
        must not be shared with them."""
        if self._dataset is None:
            return []
        some = _Some(self._dataset)
        update: dict[str, Any] = {
            "workers": min(self._loader.workers, 1),
            "persistent_workers": False,
        }
        batches = evaluation_batches(
            some,
            EvalPlan(len(some), len(some), 1),
            0,
            seed=self._seed,
            collate=list,
            config=self._loader.model_copy(update=update),
            device_type="cpu",
        )
        try:
            with batches as each:
                samples = next(each).batch
        except RunError:
            return []
        named = zip(some.indices, samples, strict=True)
        return [part for index, sample in named for part in parts_of(sample, f"sample {index}")]


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


class _Some:
    """A few samples of a dataset."""

    def __init__(self, dataset: Any) -> None:
        last = len(dataset) - 1
        self.dataset = dataset
        self.indices = sorted({last * n // (_SAMPLES - 1) for n in range(_SAMPLES)})

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, at: int) -> Any:
        return self.dataset[self.indices[at]]


def parts_of(value: Any, name: str) -> Iterator[Part]:
    """The parts of a tensor, an array, a number, text, or containers of these; of other values the
    type alone."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from parts_of(item, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for at, item in enumerate(value):
            yield from parts_of(item, f"{name}[{at}]")
    elif isinstance(value, (torch.Tensor, np.ndarray)):
        yield _tensor_part(torch.as_tensor(value) if _is_plain(value) else value, name)
    elif isinstance(value, (float, np.floating)):
        yield Part(name, "", (float(value),))
    elif isinstance(value, (str, bytes, Number)):
        yield Part(name, _hash(repr(value).encode()))
    else:
        yield Part(name, type(value).__name__)


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or value.dtype.kind in "biufc"


def _tensor_part(value: Any, name: str) -> Part:
    kind = f"{tuple(value.shape)} {value.dtype}"
    if not isinstance(value, torch.Tensor) or value.is_meta or not value.is_cpu:
        return Part(name, kind)
    if value.layout != torch.strided or not value.numel():
        return Part(name, kind)
    if value.is_complex():
        value = torch.view_as_real(value)
    last, number = value.numel() - 1, min(_VALUES, value.numel())
    some = value.flatten()[[last * n // max(number - 1, 1) for n in range(number)]]
    if value.is_floating_point():
        return Part(name, kind, tuple(some.double().tolist()))
    return Part(name, f"{kind} {_hash(repr(some.tolist()).encode())}")


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def first_difference(expected: list[Part], found: list[Part]) -> str | None:
    """The name of the first part that differs."""
    for one, other in zip(expected, found, strict=False):
        if one.name != other.name or one.exact != other.exact:
            return other.name
        if len(one.values) != len(other.values):
            return other.name
        largest = max((abs(v) for v in one.values if math.isfinite(v)), default=0.0)
        for a, b in zip(one.values, other.values, strict=True):
            same = a == b or (math.isnan(a) and math.isnan(b))
            if not same and not abs(a - b) <= _TOLERANCE * largest:
                return other.name
    if len(expected) != len(found) and expected and found:
        return max(expected, found, key=len)[min(len(expected), len(found))].name
    return None
