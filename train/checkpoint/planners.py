"""DCP planners for ``Shard`` objects: which chunks a rank saves and loads."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from train.checkpoint.damage import DamagedError
from train.distributed.shard import Chunk, Shard


class ShardSavePlanner(DefaultSavePlanner):
    """Saves the chunks of ``Shard`` objects. DCP assigns a chunk that several ranks hold to the
    rank with the least to save."""

    def __init__(self, shards: Mapping[str, Shard]) -> None:
        self._shards = shards
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """Plans to save this rank's chunks."""
        self._views: dict[MetadataIndex, Tensor] = {}
        items = []
        for name, shard in self._shards.items():
            for chunk, view in shard.chunks():
                index = MetadataIndex(name, torch.Size(chunk[0]))
                self._views[index] = view
                data = TensorWriteData(
                    chunk=_chunk(chunk),
                    properties=TensorProperties.create_from_tensor(view),
                    size=shard.shape,
                )
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The view of a chunk's memory."""
        return self._views[MetadataIndex(index.fqn, index.offset)]


class ShardLoadPlanner(DefaultLoadPlanner):
    """Loads the chunks of ``Shard`` objects from the chunks that were saved, of any placement."""

    def __init__(self, shards: Mapping[str, Shard]) -> None:
        self._shards = shards
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> LoadPlan:
        """Plans to load the saved chunks that overlap this rank's chunks."""
        assert self.metadata is not None
        self._views: dict[MetadataIndex, Tensor] = {}
        items: list[ReadItem] = []
        for name, shard in self._shards.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            chunks = list(shard.chunks())
            for chunk, view in chunks:
                self._views[MetadataIndex(name, torch.Size(chunk[0]))] = view
            items += create_read_items_for_chunk_list(name, stored, [_chunk(c) for c, _ in chunks])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The view of a chunk's memory."""
        return self._views[MetadataIndex(index.fqn, index.offset)]

    def load_bytes(self, read_item: ReadItem, _value: io.BytesIO) -> None:
        """Raises DamagedError: a value that is not a tensor would have to be unpickled."""
        raise DamagedError(f"{read_item.dest_index.fqn!r} is not a tensor")


def _chunk(chunk: Chunk) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(chunk[0]), sizes=torch.Size(chunk[1]))
