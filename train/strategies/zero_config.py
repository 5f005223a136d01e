"""DeepSpeed's config, generated in full from the run's config."""

from __future__ import annotations

import importlib
from typing import Any

from train.data.plan import BatchPlan
from train.exits import UsageError
from train.strategies.strategy_config import ZeroConfig
from train.suggest import did_you_mean


def deepspeed_config(
    options: ZeroConfig, stage: int, plan: BatchPlan, *, on_gpu: bool = False
) -> dict[str, Any]:
    """DeepSpeed's config for a stage of ZeRO. Raises UsageError where ``zero.config`` contradicts
    the run's config.

    Micro-batches may be uneven, so their size is nominal; DeepSpeed uses it for reports only.
    """
    pin_memory = options.pin_memory and on_gpu
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "overlap_comm": options.overlap_comm,
        "reduce_bucket_size": options.reduce_bucket_size,
        "allgather_partitions": True,
        "allgather_bucket_size": options.reduce_bucket_size,
        "round_robin_gradients": False,
        "ignore_unused_parameters": True,
    }
    if options.offload_optimizer != "none":
        zero["offload_optimizer"] = {
            "device": options.offload_optimizer,
            "pin_memory": pin_memory,
        }
    if stage == 3:
        if options.offload_parameters != "none":
            zero["offload_param"] = {
                "device": options.offload_parameters,
                "pin_memory": pin_memory,
            }
        zero |= {
            "stage3_param_persistence_threshold": options.param_persistence_threshold,
            "stage3_prefetch_bucket_size": options.prefetch_bucket_size,
            "stage3_max_live_parameters": options.max_live_parameters,
            "stage3_max_reuse_distance": options.max_live_parameters,
            # It would replace torch.nn.functional.linear for the whole process.
            "memory_efficient_linear": False,
        }
    elif options.offload_parameters != "none":
        raise UsageError(
            f"zero.offload_parameters is {options.offload_parameters!r}, but only stage 3 shards "
            "parameters; use strategy=zero3, or set zero.offload_parameters=none."
        )
    generated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": plan.largest_micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "train_batch_size": plan.largest_micro_batch * plan.cells,
        "gradient_clipping": 0.0,  # see ZeroStrategy._update
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
    }
    _refuse_owned(options.config)
    _refuse_unknown(options.config)
    return _merged(generated, options.config, "zero.config")


# Sections of DeepSpeed's config for which isorun has a section of its own.
_OWNED = {
    "optimizer": "optim",
    "scheduler": "schedule",
    "amp": "precision",
    "tensorboard": "track.tensorboard",
    "wandb": "track.wandb",
    "csv_monitor": "metrics.jsonl",
    "checkpoint": "checkpoint",
    "data_efficiency": "the task",
    "curriculum_learning": "the task",
    "elasticity": "batch",
}


# The modules in which DeepSpeed defines its keys, and keys that only its code names.
_MODULES = ("runtime.constants", "runtime.config", "runtime.zero.config", "comm.constants")
_MORE = {
    "aio", "activation_checkpointing", "flops_profiler", "comms_logger", "compile", "pipeline",
    "hybrid_engine", "sparse_attention", "tensor_parallel", "graph_harvesting", "sparse_gradients",
}  # fmt: skip


def _refuse_owned(own: dict[str, Any]) -> None:
    owned = {key: instead for key, instead in _OWNED.items() if key in own}
    zero = own.get("zero_optimization")
    if isinstance(zero, dict):
        owned |= {
            f"zero_optimization.{key}": instead
            for key, instead in (
                ("offload_optimizer", "zero.offload_optimizer"),
                ("offload_param", "zero.offload_parameters"),
                ("cpu_offload", "zero.offload_optimizer"),
            )
            if key in zero
        }
    for key, instead in owned.items():
        raise UsageError(
            f"zero.config.{key} is set, but isorun decides it by {instead}; remove it."
        )


def _refuse_unknown(own: dict[str, Any]) -> None:
    """DeepSpeed ignores unknown keys of this level."""
    modules = [importlib.import_module(f"deepspeed.{name}") for name in _MODULES]
    known = {v for module in modules for v in vars(module).values() if isinstance(v, str)} | _MORE
    for key, value in own.items():
        if key not in known:
            raise UsageError(
                f"zero.config.{key} is not a key of DeepSpeed's config (value {value!r})"
                f"{did_you_mean(key, known)} Correct it, or remove it."
            )


def _merged(generated: dict[str, Any], own: dict[str, Any], where: str) -> dict[str, Any]:
    merged = dict(generated)
    for key, value in own.items():
        path = f"{where}.{key}"
        if value == "auto":
            raise UsageError(f'{path} is "auto", which isorun does not resolve; give it a value.')
        if isinstance(value, dict) and isinstance(generated.get(key, {}), dict):
            merged[key] = _merged(generated.get(key, {}), value, path)
        elif key in generated and value != generated[key]:
            raise UsageError(
                f"{path} is {value!r}, but the run's config makes it {generated[key]!r}; remove "
                "it, or change the run's own key."
            )
        else:
            merged[key] = value
    return merged
