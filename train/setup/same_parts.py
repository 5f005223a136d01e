"""Checks that all ranks have built the same data and the same model.

Each rank builds them by itself. Ranks with other samples or other initial weights would train
together without an error, and a rank with fewer evaluation samples would be waited for. A few
values of each sample and tensor are compared, those with fractions up to ``_TOLERANCE``: machines
of different kinds may round differently.
"""

from __future__ import annotations

import hashlib
import math
import socket
from collections.abc import Iterator, Mapping
from numbers import Number
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from train.data.loader import evaluation_batches
from train.data.loader_config import LoaderConfig
from train.data.plan import EvalPlan
from train.distributed.collectives import Collectives
from train.exits import RunError, UsageError

_TOLERANCE = 1e-2
_VALUES = 8  # of each tensor
_SAMPLES = 3  # of each dataset


class Part(NamedTuple):
    """What is compared of a tensor or of another value."""

    name: str
    exact: str
    """Type, shape, and a hash of values without fractions."""
    values: tuple[float, ...] = ()
    """Some values with fractions."""


def check_same_model(collectives: Collectives, model: nn.Module) -> None:
    """Raises UsageError on all ranks where the parameters or buffers of a rank differ in name,
    shape or value from those of the others; collective. Tensors on the meta device have no
    values."""
    if collectives.world_size == 1:
        return
    tensors = [*model.named_parameters(), *model.named_buffers()]
    parts = [part for name, tensor in tensors for part in _parts(tensor.detach(), name)]
    if found := _odd_rank(collectives, parts):
        rank, name = found
        raise UsageError(
            f"The ranks have built different models: {name} of {_host(collectives, rank)} differs "
            "from the other ranks; let build_model() (or init_module()) depend on the config and "
            "the random generators alone, which have the same seed on all ranks."
        )


def check_same_data(
    collectives: Collectives,
    datasets: Mapping[str, Any],
    seed: int,
    loader: LoaderConfig,
) -> list[str]:
    """Raises UsageError on all ranks where a dataset of a rank differs from those of the others in
    its length or in one of a few samples; collective. ``datasets`` are by name of the method that
    returns them. Returns warnings: a sample that differs each time is none of the rank's."""
    warnings: list[str] = []
    if collectives.world_size == 1:
        return warnings
    for name, dataset in datasets.items():
        lengths = collectives.all_gather_object(None if dataset is None else len(dataset))
        if len(set(lengths)) > 1:
            usual = max(lengths, key=lengths.count)
            rank = next(rank for rank, length in enumerate(lengths) if length != usual)
            raise UsageError(
                f"The ranks have different data: {name}() has {_length(lengths[rank])} on "
                f"{_host(collectives, rank)}, but {_length(usual)} on the others; give all ranks "
                "the same files and config."
            )
        if dataset is None:
            continue
        parts = _sample_parts(dataset, seed, loader)
        found = _odd_rank(collectives, parts)
        if not found:
            continue
        again = _sample_parts(dataset, seed, loader)
        unstable = _first_difference(parts, again) is not None
        if any(collectives.all_reduce_ints([unstable])):
            warnings.append(
                f"A sample of {name}() is not the same when it is read again, so the result of "
                "this run depends on the number of ranks and on restarts; draw random numbers from "
                "the generators of torch, random or numpy alone, which are seeded for each sample."
            )
            continue
        rank, value = found
        raise UsageError(
            f"The ranks have different data: {value} of {name}() on {_host(collectives, rank)} "
            "differs from the other ranks; give all ranks the same files and config."
        )
    return warnings


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


def _sample_parts(dataset: Any, seed: int, loader: LoaderConfig) -> list[Part]:
    """Read by a worker where the run reads with workers: what a dataset opens when it is first read
    must not be shared with them. Empty where a sample cannot be read: the run may never need it."""
    some = _Some(dataset)
    update: dict[str, Any] = {"workers": min(loader.workers, 1), "persistent_workers": False}
    batches = evaluation_batches(
        some,
        EvalPlan(len(some), len(some), 1),
        0,
        seed=seed,
        collate=list,
        config=loader.model_copy(update=update),
        device_type="cpu",
    )
    try:
        with batches as each:
            samples = next(each).batch
    except RunError:
        return []
    named = zip(some.indices, samples, strict=True)
    return [part for index, sample in named for part in _parts(sample, f"sample {index}")]


def _parts(value: Any, name: str) -> Iterator[Part]:
    """The parts of a tensor, an array, a number, text, or containers of these; of other values the
    type alone."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _parts(item, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for at, item in enumerate(value):
            yield from _parts(item, f"{name}[{at}]")
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


def _odd_rank(collectives: Collectives, parts: list[Part]) -> tuple[int, str] | None:
    """A rank whose parts differ from those of most ranks, and the name of the part; collective."""
    plain = [(part.name, part.exact, part.values) for part in parts]
    of_rank_0 = [Part(*fields) for fields in collectives.broadcast_object(plain)]
    difference = _first_difference(of_rank_0, parts)
    by_rank = collectives.all_gather_object(difference)
    odd = [(rank, name) for rank, name in enumerate(by_rank) if name is not None]
    if not odd:
        return None
    rank, name = odd[0]
    # All are compared with rank 0, which may be the odd one.
    return (rank if len(odd) * 2 <= len(by_rank) else 0), name


def _first_difference(expected: list[Part], found: list[Part]) -> str | None:
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


def _host(collectives: Collectives, rank: int) -> str:
    hosts = collectives.all_gather_object(socket.gethostname())
    return f"rank {rank} ({hosts[rank]})"


def _length(length: int | None) -> str:
    return "no data" if length is None else f"{length} samples"
