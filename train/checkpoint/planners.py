"""DCP's plans for shares of tensors: which boxes a rank writes, and which it reads."""

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

from train.checkpoint.store import DamagedError
from train.distributed.shard import Chunk, Shard


class ShardSavePlanner(DefaultSavePlanner):
    """Writes the boxes of ``Shard`` objects; of boxes that several ranks hold, DCP lets the rank
    with the least to write do it."""

    def __init__(self, shards: Mapping[str, Shard]) -> None:
        self._shards = shards
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """This rank's boxes."""
        self._views: dict[MetadataIndex, Tensor] = {}
        items = []
        for name, shard in self._shards.items():
            for box, view in shard.chunks():
                index = MetadataIndex(name, torch.Size(box[0]))
                self._views[index] = view
                data = TensorWriteData(
                    chunk=_chunk(box),
                    properties=TensorProperties.create_from_tensor(view),
                    size=shard.shape,
                )
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The memory of a box."""
        return self._views[MetadataIndex(index.fqn, index.offset)]


class ShardLoadPlanner(DefaultLoadPlanner):
    """Reads the boxes of ``Shard`` objects from whatever pieces were written."""

    def __init__(self, shards: Mapping[str, Shard]) -> None:
        self._shards = shards
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> LoadPlan:
        """The pieces that overlap with this rank's boxes."""
        assert self.metadata is not None
        self._views: dict[MetadataIndex, Tensor] = {}
        items: list[ReadItem] = []
        for name, shard in self._shards.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            boxes = list(shard.chunks())
            for box, view in boxes:
                self._views[MetadataIndex(name, torch.Size(box[0]))] = view
            items += create_read_items_for_chunk_list(name, stored, [_chunk(b) for b, _ in boxes])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The memory of a box."""
        return self._views[MetadataIndex(index.fqn, index.offset)]

    def load_bytes(self, read_item: ReadItem, _value: io.BytesIO) -> None:
        """Refused: what is no tensor would have to be unpickled."""
        raise DamagedError(f"{read_item.dest_index.fqn!r} is no tensor")


def _chunk(box: Chunk) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box[0]), sizes=torch.Size(box[1]))
