"""A few values of what a run is made of, to tell whether two are the same: of its model, and of a
few samples of its data.

Values with fractions may differ up to ``_TOLERANCE``: machines of different kinds may round
differently.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from numbers import Number
from typing import Any, NamedTuple

import numpy as np
import torch

from train.data.loader import evaluation_batches
from train.data.loader_config import LoaderConfig
from train.data.plan import EvalPlan
from train.distributed.randomness import GlobalRngState
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
    stored: bool = True
    """Whether checkpoints have it: not text, which may hold paths of one machine, nor types."""


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
        """Reads the samples twice more, from the same states of the global generators: whether
        they are the same each time. Both in one process, since two could start alike."""
        both = self._read(times=2)
        half = len(both) // 2
        return first_difference(both[:half], both[half:]) is None and (
            first_difference(self.parts, both[:half]) is None
        )

    def to_json(self) -> list[Any]:
        """What a checkpoint has of the samples."""
        return [
            [
                part.name,
                part.exact,
                [value if math.isfinite(value) else None for value in part.values],
            ]
            for part in self._stored()
        ]

    def _stored(self) -> Iterator[Part]:
        """As many parts of each sample."""
        counts: Counter[str] = Counter()
        for part in self.parts:
            sample = part.name.partition("[")[0]
            if part.stored and counts[sample] < _STORED // _SAMPLES:
                counts[sample] += 1
                yield part

    def difference(self, stored: Any) -> str | None:
        """The name of the first part that is not as ``to_json`` stored it; None where all are, and
        for anything that this version does not store."""
        try:
            before = _from_json(stored)
        except (TypeError, ValueError, OverflowError):
            return None
        return first_difference(before, _from_json(self.to_json()))

    def _read(self, times: int = 1) -> list[Part]:
        """The parts of all samples, then those of the next reading. By a worker where the run reads
        with workers: what a dataset opens when it is first read must not be shared with them."""
        if self._dataset is None:
            return []
        some = _Some(self._dataset, times)
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
        return [
            part
            for time in range(times)
            for index, readings in zip(some.indices, samples, strict=True)
            for part in parts_of(readings[time], f"sample {index}")
        ]


def _from_json(stored: Any) -> list[Part]:
    return [
        Part(name, exact, tuple(math.nan if value is None else float(value) for value in values))
        for name, exact, values in stored
    ]


class _Some:
    """A few samples of a dataset, each read several ``times``."""

    def __init__(self, dataset: Any, times: int) -> None:
        last = len(dataset) - 1
        self.dataset, self.times = dataset, times
        self.indices = sorted({last * n // (_SAMPLES - 1) for n in range(_SAMPLES)})

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, at: int) -> list[Any]:
        readings, generators = [], GlobalRngState(cuda=False)
        for _ in range(self.times):
            generators.restore()
            readings.append(self.dataset[self.indices[at]])
        return readings


def parts_of(value: Any, name: str) -> Iterator[Part]:
    """The parts of a tensor, an array, a number, text, or containers of these; of other values the
    type alone."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from parts_of(item, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)) and _are_numbers(value):
        yield _array_part(np.asarray(value), name)
    elif isinstance(value, (list, tuple)):
        for at, item in enumerate(value):
            yield from parts_of(item, f"{name}[{at}]")
    elif isinstance(value, (torch.Tensor, np.ndarray)):
        yield _array_part(value, name)
    elif isinstance(value, float):
        yield Part(name, "", (value,))
    elif isinstance(value, (str, bytes, Number)):
        is_text = isinstance(value, (str, bytes))
        yield Part(name, _hash(repr(value).encode("utf-8", "replace")), stored=not is_text)
    else:
        yield Part(name, type(value).__name__, stored=False)


def _are_numbers(values: Sequence[Any]) -> bool:
    return bool(values) and all(type(value) in (int, float, bool) for value in values)


def _array_part(value: Any, name: str) -> Part:
    """That of a tensor or an array; of one that torch cannot look into, the type alone."""
    try:
        if isinstance(value, np.ndarray):
            native = value.astype(value.dtype.newbyteorder("="), copy=False)
            plain = value.dtype.kind in "biufc"
            value = torch.as_tensor(np.ascontiguousarray(native)) if plain else value
        return _tensor_part(value, name)
    except Exception:
        return Part(name, type(value).__name__, stored=False)


def _tensor_part(value: Any, name: str) -> Part:
    kind = f"{tuple(value.shape)} {value.dtype}"
    if not isinstance(value, torch.Tensor) or value.is_meta or not value.is_cpu:
        return Part(name, kind)
    if value.layout != torch.strided or not value.numel():
        return Part(name, kind)
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
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
