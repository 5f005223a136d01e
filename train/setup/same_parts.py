"""Checks that all ranks have built the same data and the same model.

Each rank builds them by itself. Ranks with other samples or other initial weights would train
together without an error, and a rank with fewer evaluation samples would be waited for.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

from torch import nn

from train.distributed.collectives import Collectives
from train.exits import UsageError
from train.setup.fingerprint import DataFingerprint, Part, first_difference, parts_of


def check_same_model(collectives: Collectives, model: nn.Module) -> None:
    """Raises UsageError on all ranks where the parameters or buffers of a rank differ in name,
    shape or value from those of the others; collective. Tensors on the meta device have no
    values."""
    if collectives.world_size == 1:
        return
    tensors = [*model.named_parameters(), *model.named_buffers()]
    parts = [part for name, tensor in tensors for part in parts_of(tensor.detach(), name)]
    if found := _odd_rank(collectives, parts):
        rank, name = found
        raise UsageError(
            f"The ranks have built different models: {name} of {_host(collectives, rank)} differs "
            "from the other ranks; let build_model() (or init_module()) depend on the config and "
            "the random generators alone, which have the same seed on all ranks."
        )


def check_same_data(collectives: Collectives, datasets: Mapping[str, DataFingerprint]) -> list[str]:
    """Raises UsageError on all ranks where a dataset of a rank differs from those of the others in
    its length or in one of a few samples; collective. ``datasets`` are by name of the method that
    returns them. Returns warnings: a sample that differs each time is none of the rank's."""
    warnings: list[str] = []
    if collectives.world_size == 1:
        return warnings
    for name, dataset in datasets.items():
        lengths = collectives.all_gather_object(dataset.length)
        if len(set(lengths)) > 1:
            usual = max(lengths, key=lengths.count)
            rank = next(rank for rank, length in enumerate(lengths) if length != usual)
            raise UsageError(
                f"The ranks have different data: {name}() has {_length(lengths[rank])} on "
                f"{_host(collectives, rank)}, but {_length(usual)} on the others; give all ranks "
                "the same files and config."
            )
        found = _odd_rank(collectives, dataset.parts)
        if not found:
            continue
        if any(collectives.all_reduce_ints([not dataset.is_stable()])):
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


def _odd_rank(collectives: Collectives, parts: list[Part]) -> tuple[int, str] | None:
    """A rank whose parts differ from those of most ranks, and the name of the part; collective."""
    plain = [(part.name, part.exact, part.values) for part in parts]
    of_rank_0 = [Part(*fields) for fields in collectives.broadcast_object(plain)]
    difference = first_difference(of_rank_0, parts)
    by_rank = collectives.all_gather_object(difference)
    odd = [(rank, name) for rank, name in enumerate(by_rank) if name is not None]
    if not odd:
        return None
    rank, name = odd[0]
    # All are compared with rank 0, which may be the odd one.
    return (rank if len(odd) * 2 <= len(by_rank) else 0), name


def _host(collectives: Collectives, rank: int) -> str:
    hosts = collectives.all_gather_object(socket.gethostname())
    return f"rank {rank} ({hosts[rank]})"


def _length(length: int | None) -> str:
    return "no data" if length is None else f"{length} samples"
