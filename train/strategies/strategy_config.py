"""The options of each strategy: speed and memory, and results only where they say so."""

from __future__ import annotations

from typing import Any, Literal

from train.section import Section, non_semantic


class DdpConfig(Section):
    """Options of DistributedDataParallel; for one process they mean nothing."""

    bucket_cap_mb: int = non_semantic(25, ge=1)
    """Gradients are exchanged in buckets of this many MiB while backward still runs."""

    static_graph: bool = non_semantic(False)
    """The model uses the same parameters in each step: less work, and unused ones are allowed.
    With several micro-batches per step, gradients are exchanged at each of them."""

    gradient_as_bucket_view: bool = non_semantic(True)
    """Gradients live in the buckets: saves memory as large as the gradients."""

    find_unused_parameters: bool = non_semantic(False)
    """Look, each step, for parameters that the loss did not use; costs a walk over the graph."""

    comm_hook: Literal["none", "fp16", "bf16"] = "none"
    """Exchange gradients in this precision: half the traffic, but no longer the same curve."""


class Fsdp2Config(Section):
    """Options of FSDP2."""

    blocks: list[str] = non_semantic([])
    """Class names of the modules that are gathered one at a time. Empty: what the task's
    ``blocks`` names, or else the members of the model's module lists."""

    reshard_after_forward: bool = non_semantic(True)
    """Free gathered parameters after forward and gather them again for backward: less memory,
    half as much traffic again."""

    cpu_offload: bool = non_semantic(False)
    """Keep parameters, gradients and optimiser state in host memory."""

    replicas: int = non_semantic(1, ge=1)
    """Hybrid sharding: so many copies of the model, each cut over world size / replicas ranks.
    With a copy per host, parameters never cross the network; gradients still do."""

    gather_precision: bool = True
    """With mixed precision, gather parameters in that precision: half the traffic. Gradients are
    always reduced in fp32."""


class ZeroConfig(Section):
    """Options of the ZeRO strategies."""

    offload_optimizer: Literal["none", "cpu"] = non_semantic("none")
    """Keep optimiser state, and do its arithmetic, in host memory."""

    offload_parameters: Literal["none", "cpu"] = non_semantic("none")
    """Stage 3: keep the parameters' shares in host memory."""

    reduce_bucket_size: int = non_semantic(50_000_000, ge=1)
    """Gradients are reduced in buckets of this many elements."""

    overlap_comm: bool = non_semantic(True)
    """Reduce gradients while backward still runs."""

    param_persistence_threshold: int = non_semantic(10_000, ge=0)
    """Stage 3: parameters with fewer elements than this are not cut."""

    prefetch_bucket_size: int = non_semantic(50_000_000, ge=0)
    """Stage 3: elements gathered ahead of need."""

    max_live_parameters: int = non_semantic(1_000_000_000, ge=0)
    """Stage 3: gathered elements that may be kept."""

    config: dict[str, Any] = {}
    """Further keys for DeepSpeed's own config, merged in; some of them change results. What this
    kit's config decides cannot be contradicted here, and no value can be "auto"."""
