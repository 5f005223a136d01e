"""The options of each strategy. They change speed and memory, and results only where stated."""

from __future__ import annotations

from typing import Any, Literal

from train.section import Section, non_semantic


class DdpConfig(Section):
    """Options of DistributedDataParallel; ignored with one process."""

    bucket_cap_mb: int = non_semantic(25, ge=1)
    """Size in MiB of the buckets in which gradients are exchanged while backward runs."""

    static_graph: bool = non_semantic(False)
    """Declare that the model uses the same parameters in each step: saves work, and allows unused
    parameters. Gradients are then exchanged at each micro-batch of a step."""

    gradient_as_bucket_view: bool = non_semantic(True)
    """Let gradients be views of the buckets: saves memory of the size of the gradients."""

    find_unused_parameters: bool = non_semantic(False)
    """Let DDP search the graph for parameters that the loss does not use, in each step. Without it,
    they are found after the backward pass, and their part of the exchange comes last."""

    comm_hook: Literal["none", "fp16", "bf16"] = "none"
    """Exchange gradients in this precision: halves the traffic and changes the loss curve."""


class Fsdp2Config(Section):
    """Options of FSDP2."""

    blocks: list[str] = non_semantic([])
    """Class names of the modules whose parameters are gathered one module at a time. Empty: the
    modules that the task's ``blocks`` names, else the members of the model's module lists."""

    reshard_after_forward: bool = non_semantic(True)
    """Free gathered parameters after forward and gather them again for backward: less memory, 50 %
    more traffic."""

    cpu_offload: bool = non_semantic(False)
    """Keep parameters, gradients and optimiser state in host memory."""

    replicas: int = non_semantic(1, ge=1)
    """Hybrid sharding: number of copies of the model, each sharded over world size / replicas
    ranks. With a copy per host, only gradients cross the network, not parameters."""

    gather_precision: bool = True
    """With mixed precision, gather parameters in that precision: halves the traffic. Gradients are
    always reduced in fp32."""


class ZeroConfig(Section):
    """Options of the ZeRO strategies."""

    offload_optimizer: Literal["none", "cpu"] = non_semantic("none")
    """Keep the optimiser state in host memory, and update the parameters there."""

    offload_parameters: Literal["none", "cpu"] = non_semantic("none")
    """Stage 3: keep the parameters' shards in host memory."""

    pin_memory: bool = non_semantic(True)
    """On a GPU, lock the host memory of offloaded tensors, so that copies are faster. torch then
    rounds the size of each up to a power of two."""

    reduce_bucket_size: int = non_semantic(50_000_000, ge=1)
    """Elements of the buckets in which gradients are reduced."""

    overlap_comm: bool = non_semantic(True)
    """Reduce gradients while backward runs."""

    param_persistence_threshold: int = non_semantic(10_000, ge=0)
    """Stage 3: parameters with fewer elements than this are not sharded."""

    prefetch_bucket_size: int = non_semantic(50_000_000, ge=0)
    """Stage 3: elements to gather ahead of their use."""

    max_live_parameters: int = non_semantic(1_000_000_000, ge=0)
    """Stage 3: most elements to keep gathered."""

    config: dict[str, Any] = {}
    """Further keys of DeepSpeed's own config; some of them change results. Keys that the run's
    config decides cannot be overridden, and no value can be "auto"."""
