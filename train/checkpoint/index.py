"""The index of a checkpoint as data: which bytes of which file hold each part of each tensor.

New checkpoints have it as ``index.json``. Those of earlier versions have only ``.metadata``, a
pickle of ``torch.distributed.checkpoint``, which train.checkpoint.pickled_index reads as data.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.checkpoint.damage import NOT_A_FILE, DamagedError
from train.checkpoint.pickled_index import MOST_DIMENSIONS, read_pickled_index
from train.files import is_plain_name, read_bytes
from train.json_files import Fields, has_fields, is_count, parse_object, shown

INDEX = "index.json"
PICKLED_INDEX = ".metadata"
DATA_SUFFIX = ".distcp"
"""The suffix of files with tensors."""
_FORMAT = 1
_LIMIT = 1 << 30  # bytes; a chunk takes about 130
_BITS = re.compile(r"(?:b?float|complex|q?u?int|bits)([1-8]|16|32|64|128)(?:_?[a-z]\w*)?")
"""Bits of an element in torch's name of a dtype. Some have a suffix, such as float8_e4m3fn."""
_TENSOR: Fields = {"dtype": str, "shape": list, "chunks": list}
_CHUNK: Fields = {"offsets": list, "sizes": list, "file": str, "at": int, "length": int}


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor."""

    offsets: tuple[int, ...]
    """Of its first element, per dimension."""
    sizes: tuple[int, ...]
    """Elements per dimension."""
    file: str
    """The file of the checkpoint that holds it."""
    at: int
    """The first byte in the file."""
    length: int
    """Bytes in the file."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint."""

    dtype: str
    """The name in torch, such as ``float32``."""
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


Index = Mapping[str, StoredTensor]
"""All tensors of a checkpoint, by name."""


def to_json(index: Index) -> str:
    """The text of ``index.json``."""
    tensors = {
        name: {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "chunks": [vars(chunk) for chunk in tensor.chunks],
        }
        for name, tensor in index.items()
    }
    return json.dumps({"format": _FORMAT, "tensors": tensors}, separators=(",", ":"))


def read_index(checkpoint: Path, files: Mapping[str, Mapping[str, Any]]) -> Index:
    """The index of a checkpoint with these files (``size`` by name, from its manifest).

    Raises DamagedError if it is damaged, names another file or does not cover its tensors.
    """
    name = INDEX if INDEX in files else PICKLED_INDEX
    path = checkpoint / name
    if name not in files:
        raise DamagedError(f"{checkpoint} has neither {INDEX} nor {PICKLED_INDEX} in its manifest")
    try:
        data = read_bytes(path, _LIMIT)
        tensors = _parse(data) if name == INDEX else read_pickled_index(data)
        index = {tensor: _stored(tensor, values) for tensor, values in tensors.items()}
        for tensor, stored in index.items():
            _check(tensor, stored, files)
    except (*NOT_A_FILE, ValueError) as error:
        raise DamagedError(f"{path} cannot be used ({error})") from None
    return index


def item_size(dtype: str) -> int | None:
    """Bytes of an element; None if torch has no such dtype. By the name, so that ``verify`` need
    not import torch."""
    if dtype == "bool":
        return 1
    named = _BITS.fullmatch(dtype)
    return max(1, int(named[1]) // 8) if named else None


def _parse(data: bytes) -> dict[str, Any]:
    values = parse_object(data, {"format": int, "tensors": dict})
    if values["format"] != _FORMAT:
        raise ValueError("its format is one that this version of isorun does not support")
    tensors: dict[str, Any] = values["tensors"]
    return tensors


def _stored(name: str, values: object) -> StoredTensor:
    if not has_fields(values, _TENSOR):
        raise ValueError(f"the entry of {shown(name)} is not that of a tensor")
    chunks = []
    for chunk in values["chunks"]:
        if not has_fields(chunk, _CHUNK):
            raise ValueError(f"a chunk of {shown(name)} lacks a value, or has one of another type")
        offsets, sizes = _counts(name, chunk["offsets"]), _counts(name, chunk["sizes"])
        (at, length) = _counts(name, [chunk["at"], chunk["length"]])
        chunks.append(Chunk(offsets, sizes, chunk["file"], at, length))
    return StoredTensor(values["dtype"], _counts(name, values["shape"]), tuple(chunks))


def _counts(name: str, values: list[object]) -> tuple[int, ...]:
    counts = tuple(value for value in values[: MOST_DIMENSIONS + 1] if is_count(value))
    if len(counts) != len(values) or len(counts) > MOST_DIMENSIONS:
        raise ValueError(f"the entry of {shown(name)} has a size or an offset that is not a count")
    return counts


def _check(name: str, tensor: StoredTensor, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ValueError unless the chunks are inside the tensor and their files, and cover it."""
    if (size := item_size(tensor.dtype)) is None:
        raise ValueError(f"{shown(name)} has the dtype {shown(tensor.dtype)}, which is unknown")
    covered, begins = 0, set()
    for chunk in tensor.chunks:
        if not is_plain_name(chunk.file) or chunk.file not in files:
            raise ValueError(
                f"{shown(name)} is in {shown(chunk.file)}, which is not a file of the manifest"
            )
        if chunk.at + chunk.length > files[chunk.file]["size"]:
            raise ValueError(f"a chunk of {shown(name)} is beyond the end of {chunk.file}")
        ends = zip(chunk.offsets, chunk.sizes, tensor.shape, strict=False)
        same = len(chunk.offsets) == len(chunk.sizes) == len(tensor.shape)
        if not same or any(offset + size > full for offset, size, full in ends):
            raise ValueError(f"a chunk of {shown(name)} is outside its shape {tensor.shape}")
        if elements := math.prod(chunk.sizes):
            covered += elements
            begins.add(chunk.offsets)
            # Else more memory would be allocated for the tensor than it has on the disk.
            if elements * size > chunk.length:
                raise ValueError(f"a chunk of {shown(name)} has {chunk.length} bytes, too few")
    nonempty = sum(math.prod(chunk.sizes) > 0 for chunk in tensor.chunks)
    if covered != math.prod(tensor.shape) or len(begins) != nonempty:
        raise ValueError(f"the chunks of {shown(name)} do not cover its shape {tensor.shape}")
