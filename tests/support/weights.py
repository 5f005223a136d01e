"""Sources of weights, as a run, another program or somebody who means harm writes them."""

import json

import torch
from safetensors.torch import save_file

from train.checkpoint import dcp
from train.checkpoint.manifest import Manifest, hash_file
from train.checkpoint.store import CheckpointStore
from train.distributed.shard import Shard


def write_checkpoint(directory, tensors, step=3, **state):
    """A committed checkpoint of a run with these tensors of the model; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "run.json").write_text(
        json.dumps({"id": "r", "name": "r", "wandb_id": "r", "created": 1.0})
    )
    store = CheckpointStore(directory / "checkpoints")
    temporary = store.begin(step)
    dcp.save({f"model.{name}": Shard.of(t) for name, t in tensors.items()}, temporary, None)
    files = {entry.name: hash_file(entry) for entry in temporary.iterdir()}
    progress = {"step": step, "position": 12 * step}
    state = {"progress": progress, "window": {"loss_sum": 0, "count": 0, "norm": None},
             "samples": 9, "optimizer": {}, "run": "r", **state}  # fmt: skip
    return store.commit(temporary, Manifest(step, state, None, files))


def write_shards(directory, *parts):
    """Several safetensors files with their index, as ``save_pretrained`` writes them."""
    directory.mkdir(exist_ok=True)
    weight_map = {}
    for number, tensors in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(tensors, directory / name)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def some_tensors(seed=0):
    """Tensors of several shapes and dtypes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "layer.weight": torch.randn(4, 3, generator=generator),
        "layer.bias": torch.randn(4, generator=generator).bfloat16(),
        "scale": torch.randn((), generator=generator),
        "count": torch.tensor(7),
    }
