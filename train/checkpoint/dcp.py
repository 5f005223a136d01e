"""Saves and loads sharded tensors with ``torch.distributed.checkpoint`` (DCP).

DCP stores tensors by name, in one file per rank, and loads them into any placement. Its own index,
the pickle ``.metadata``, is written for DCP's tools only: where a tensor is comes from the index
that train.checkpoint.index reads as data. DCP reads tensors with ``weights_only``. Other values are
refused; the state of the loop is JSON in the manifest.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from train.checkpoint.damage import DamagedError
from train.checkpoint.index import (
    DATA_SUFFIX,
    INDEX,
    PICKLED_INDEX,
    Chunk,
    Index,
    StoredTensor,
    to_json,
)
from train.checkpoint.index import read_index as read_index_of
from train.checkpoint.manifest import MANIFEST, Manifest
from train.checkpoint.stored_tensor import check_tensors
from train.exits import first_line
from train.files import open_regular
from train.json_files import shown
from train.process.diagnose import is_out_of_memory

_UNREADABLE = (
    pickle.UnpicklingError, EOFError, AssertionError, LookupError, TypeError, ValueError,
    AttributeError,
)  # fmt: skip
"""What ``torch.load`` raises, with ``weights_only``, for bytes that are not a tensor."""

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.distributed.checkpoint.metadata import Metadata

    from train.distributed.shard import Shard


_newest: dict[Any, Index] = {}
"""The index that was read last."""


def read_index(directory: Path) -> Index:
    """The index of a checkpoint, checked against its manifest or, before the commit, against the
    files that are there. Raises DamagedError."""
    try:
        found = [(directory / name).lstat() for name in (MANIFEST, INDEX)]
    except OSError:
        return _read_index(directory)
    # A resume reads it several times, and it may be large.
    key = (directory, *((status.st_ino, status.st_mtime_ns, status.st_size) for status in found))
    if key not in _newest:
        index = _read_index(directory)
        _newest.clear()
        _newest[key] = index
    return _newest[key]


def _read_index(directory: Path) -> Index:
    import torch

    if (directory / MANIFEST).exists():
        files: Mapping[str, Mapping[str, Any]] = Manifest.read(directory).files
    else:
        files = {
            entry.name: {"size": entry.lstat().st_size}
            for entry in directory.iterdir()
            if entry.suffix == DATA_SUFFIX or entry.name in (INDEX, PICKLED_INDEX)
        }
    index = read_index_of(directory, files)
    for name, tensor in index.items():
        if not isinstance(getattr(torch, tensor.dtype, None), torch.dtype):
            raise DamagedError(
                f"{directory} has {shown(name)} of the dtype {shown(tensor.dtype)}, which this "
                "version of torch does not have"
            )
    return index


def shapes(directory: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor of a checkpoint, by name. Raises DamagedError."""
    import torch

    return {
        name: (torch.Size(tensor.shape), getattr(torch, tensor.dtype))
        for name, tensor in read_index(directory).items()
    }


def _metadata(index: Index) -> Metadata:
    """The index in the form that DCP uses."""
    import torch
    from torch.distributed.checkpoint import metadata as forms
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    entries: dict[str, Any] = {}
    places = {}
    for name, tensor in index.items():
        chunks = []
        for chunk in tensor.chunks:
            offsets = torch.Size(chunk.offsets)
            chunks.append(forms.ChunkStorageMetadata(offsets, torch.Size(chunk.sizes)))
            places[forms.MetadataIndex(name, offsets)] = _StorageInfo(
                chunk.file, chunk.at, chunk.length
            )
        properties = forms.TensorProperties(getattr(torch, tensor.dtype))
        entries[name] = forms.TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
    return forms.Metadata(entries, storage_data=places, storage_meta=forms.StorageMeta())


def _index(metadata: Metadata, places: Mapping[Any, Any]) -> Index:
    """The index of what DCP has written. ``places``: the file, offset and length of each chunk."""
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

    index = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata), name
        chunks = []
        for chunk in entry.chunks:
            place = places[MetadataIndex(name, chunk.offsets)]
            where = place.relative_path, place.offset, place.length
            chunks.append(Chunk(tuple(chunk.offsets), tuple(chunk.sizes), *where))
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        index[name] = StoredTensor(dtype, tuple(entry.size), tuple(chunks))
    return index


def save(shards: Mapping[str, Shard], directory: Path, group: ProcessGroup | None) -> None:
    """Saves the named shards to ``directory``; collective over ``group`` (None: this process only).

    Chunks that several ranks hold are saved by one of them.
    """
    from torch.distributed.checkpoint import state_dict_saver
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    from train.checkpoint.planners import ShardSavePlanner

    class Writer(FileSystemWriter):
        def finish(self, metadata: Metadata, results: Any) -> None:
            super().finish(metadata, results)  # not every version of torch changes the metadata
            places = {written.index: written.storage_data for part in results for written in part}
            index = to_json(_index(metadata, places))
            (directory / INDEX).write_text(index, encoding="utf-8")

    # With more than one thread, DCP drops the exceptions of its writer threads.
    writer = Writer(directory, thread_count=1, sync_files=True)
    with _without_single_process_warning():
        state_dict_saver.save(
            dict(shards),
            storage_writer=writer,
            planner=ShardSavePlanner(shards),
            process_group=group,
            no_dist=group is None,
        )


def load(shards: Mapping[str, Shard], directory: Path, group: ProcessGroup | None) -> None:
    """Loads the named shards in place from a checkpoint of any placement; collective over
    ``group``.

    Each rank reads only its own chunks. Raises DamagedError for a damaged index or for an entry
    that is not a tensor, and what went wrong first on any rank, such as an OSError.
    """
    import torch
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader

    from train.checkpoint.planners import ShardLoadPlanner

    metadata = _metadata(read_index(directory))  # raises before DCP can wrap it in its own error

    class Files(FileSystem):
        @contextmanager
        def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
            with os.fdopen(open_regular(path), mode) as stream:
                yield cast(io.IOBase, stream)

    class Reader(FileSystemReader):
        def __init__(self) -> None:
            super().__init__(directory)
            self.fs = Files()

        def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
            return metadata

        def read_data(self, plan: Any, planner: Any) -> Any:
            try:
                places = (metadata.storage_data[item.storage_index] for item in plan.items)
                check_tensors(directory, ((p.relative_path, p.offset, p.length) for p in places))
                return super().read_data(plan, planner)
            except (*_UNREADABLE, RuntimeError) as error:
                if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
                    raise
                reason = f"{type(error).__name__}: {first_line(error)}"
                raise DamagedError(f"A tensor of {directory} cannot be read ({reason})") from error

    with _without_single_process_warning():
        try:
            state_dict_loader.load(
                dict(shards),
                storage_reader=Reader(),
                planner=ShardLoadPlanner(shards),
                process_group=group,
                no_dist=group is None,
            )
        except CheckpointException as error:  # a BaseException, which no handler expects
            raise next(failure for failure, _ in error.failures.values()) from error


@contextmanager
def _without_single_process_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
