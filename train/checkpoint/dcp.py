"""Saves and loads sharded tensors with ``torch.distributed.checkpoint`` (DCP), without unsafe
pickles.

DCP stores tensors by name, in one file per rank, and loads them into any placement. Its metadata is
a pickle, which is read here with an unpickler that allows only DCP's own dataclasses. Values that
are not tensors, which DCP would unpickle, are refused; the state of the loop is JSON in the
manifest.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import EnumMeta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checkpoint.store import NOT_A_FILE, DamagedError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.distributed.checkpoint.metadata import Metadata

    from train.distributed.shard import Shard

_METADATA = ".metadata"
_BROKEN_PICKLE = (
    EOFError, AttributeError, ImportError, LookupError, TypeError, ValueError, RecursionError,
)  # fmt: skip
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        import torch

        if (module, name) == ("builtins", "getattr"):
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name not in _ALLOWED.get(module, ()) and not is_dtype:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint")
        return super().find_class(module, name)


def _member(cls: Any, name: str) -> Any:
    """An enum member, which early releases of Python 3.11 pickle as a call of ``getattr``."""
    if not isinstance(cls, EnumMeta) or name not in cls.__members__:
        raise pickle.UnpicklingError(f"{cls!r}.{name} is not allowed in a checkpoint")
    return cls[name]


def read_metadata(directory: Path) -> Metadata:
    """DCP's metadata: shape, dtype and chunks of each tensor. Raises DamagedError."""
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        metadata = _MetadataUnpickler(io.BytesIO((directory / _METADATA).read_bytes())).load()
    except (*NOT_A_FILE, *_BROKEN_PICKLE) as error:
        raise DamagedError(f"{directory / _METADATA} cannot be read ({error})") from None
    except pickle.UnpicklingError as error:
        raise DamagedError(f"{directory / _METADATA} is not safe to load: {error}") from None
    if not isinstance(metadata, Metadata):
        raise DamagedError(f"{directory / _METADATA} is not DCP metadata")
    return metadata


def shapes(directory: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor of a checkpoint, by name. Raises DamagedError."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = {}
    for name, entry in read_metadata(directory).state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise DamagedError(f"{directory} holds {name!r}, which is not a tensor")
        found[name] = (entry.size, entry.properties.dtype)
    return found


def save(shards: Mapping[str, Shard], directory: Path, group: ProcessGroup | None) -> None:
    """Saves the named shards to ``directory``; collective over ``group`` (None: this process only).

    Chunks that several ranks hold are saved by one of them.
    """
    from torch.distributed.checkpoint import state_dict_saver
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    from train.checkpoint.planners import ShardSavePlanner

    # With more than one thread, DCP drops the exceptions of its writer threads.
    writer = FileSystemWriter(directory, thread_count=1, sync_files=True)
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

    Each rank reads only its own chunks. Raises DamagedError for damaged metadata or for an entry
    that is not a tensor, and what went wrong first on any rank, such as an OSError.
    """
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    from train.checkpoint.planners import ShardLoadPlanner

    shapes(directory)  # raises DamagedError before DCP can wrap it in its own error
    metadata = read_metadata(directory)

    class Reader(FileSystemReader):
        def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
            if metadata.storage_meta is not None:
                metadata.storage_meta.load_id = self.load_id
            return metadata

    with _without_single_process_warning():
        try:
            state_dict_loader.load(
                dict(shards),
                storage_reader=Reader(directory),
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
