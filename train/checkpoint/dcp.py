"""Tensors to and from files through ``torch.distributed.checkpoint``, without trusting pickles.

DCP stores tensors by name, in one file per rank, and reads them back into any placement. Two of
its habits are replaced: its metadata is a pickle, read here by an unpickler that knows only DCP's
own dataclasses; and it unpickles values that are not tensors, which are refused here (the state
of the loop is JSON, in the manifest).
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

from train.checkpoint.store import DamagedError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.distributed.checkpoint.metadata import Metadata

    from train.distributed.shard import Shard

_METADATA = ".metadata"
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
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint")
        return super().find_class(module, name)


def _member(cls: Any, name: str) -> Any:
    """How early releases of Python 3.11 write a member of an enumeration; no other attribute is
    given out."""
    if not isinstance(cls, EnumMeta) or name not in cls.__members__:
        raise pickle.UnpicklingError(f"{cls!r}.{name} does not belong in a checkpoint")
    return cls[name]


def read_metadata(directory: Path) -> Metadata:
    """DCP's metadata: for each tensor its shape and dtype, and where its pieces lie."""
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        metadata = _MetadataUnpickler(io.BytesIO((directory / _METADATA).read_bytes())).load()
    except (OSError, EOFError, AttributeError, ImportError, IndexError) as error:
        raise DamagedError(f"{directory / _METADATA} cannot be read ({error})") from None
    except pickle.UnpicklingError as error:
        raise DamagedError(f"{directory / _METADATA} is not to be trusted: {error}") from None
    if not isinstance(metadata, Metadata):
        raise DamagedError(f"{directory / _METADATA} holds no checkpoint metadata")
    return metadata


def shapes(directory: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name, shape and dtype of every tensor in a checkpoint."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = {}
    for name, entry in read_metadata(directory).state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise DamagedError(f"{directory} holds {name!r}, which is no tensor")
        found[name] = (entry.size, entry.properties.dtype)
    return found


def save(shards: Mapping[str, Shard], directory: Path, group: ProcessGroup | None) -> None:
    """Writes the named tensors; collective over ``group`` (None: alone).

    Each rank writes what only it holds, and a part of what several hold.
    """
    from torch.distributed.checkpoint import state_dict_saver
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    from train.checkpoint.planners import ShardSavePlanner

    # One thread: with more, DCP loses the exceptions of its writer threads.
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
    """Fills the given shares in place from a checkpoint that holds each of their names, whoever
    wrote it. Each rank reads its own share only."""
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    from train.checkpoint.planners import ShardLoadPlanner

    shapes(directory)  # refuses what is damaged or no tensor, before DCP wraps it in its own error
    metadata = read_metadata(directory)

    class Reader(FileSystemReader):
        def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
            if metadata.storage_meta is not None:
                metadata.storage_meta.load_id = self.load_id
            return metadata

    with _without_single_process_warning():
        state_dict_loader.load(
            dict(shards),
            storage_reader=Reader(directory),
            planner=ShardLoadPlanner(shards),
            process_group=group,
            no_dist=group is None,
        )


@contextmanager
def _without_single_process_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
