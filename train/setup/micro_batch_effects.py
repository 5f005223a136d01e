"""What a model computes from a whole micro-batch, so that results depend on how steps are divided.

Everything else in a run does not: gradients and metrics are sums over samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from train.data.plan import BatchPlan
from train.suggest import listed


def dropout_note(plan: BatchPlan, model: nn.Module) -> str:
    """A sentence on dropout for a run whose placement chooses the size of micro-batches; empty for
    a model without it."""
    if not _has_dropout(model):
        return ""
    size = plan.largest_micro_batch
    return (
        "Dropout draws its masks for each micro-batch, whose size the placement chooses, here "
        f"{size} samples: on placements with another size the numbers differ. For the same numbers "
        f"everywhere, set batch.micro_batch_size, such as to {size}."
    )


def micro_batch_warnings(last: Mapping[str, Any], plan: BatchPlan, model: nn.Module) -> list[str]:
    """Warnings on parts of the model in training mode whose results depend on the micro-batches of
    ``plan``. ``last`` is the record of the attempt before, empty at the first start."""
    before, now = last.get("micro_batch_size"), plan.largest_micro_batch
    moved = before not in (None, now)
    warnings = []
    if found := _depending(model):
        parts = listed([f"{name} ({kind})" for name, kind in found.items()], 3)
        text = (
            f"Results depend on the number of ranks and on batch.micro_batch_size, because of "
            f"{parts}, which use{'s' if len(found) == 1 else ''} whole micro-batches."
        )
        if moved:
            text += f" Micro-batches have {now} samples now and had {before} before."
        warnings.append(text)
    if moved and _has_dropout(model):
        warnings.append(
            f"Micro-batches have {now} samples now and had {before} before, so dropout draws other "
            "masks and the numbers differ from those of an unmoved run. For the same numbers on "
            "every placement, start the run with a batch.micro_batch_size that all placements can "
            "use."
        )
    return warnings


def _has_dropout(model: nn.Module) -> bool:
    """Whether a module of torch draws dropout masks in training mode."""
    return any(module.training and _drops(module) for module in model.modules())


def _drops(module: nn.Module) -> bool:
    """Whether a module of torch draws dropout masks."""
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return module.dropout > 0
    return isinstance(module, _DropoutNd) and module.p > 0


def _depending(model: nn.Module) -> dict[str, str]:
    """The modules that normalise by a micro-batch, or that change once per forward pass: name to
    kind."""
    found = {}
    for name, module in model.named_modules():
        if kind := known_kind(module):
            found[name.split(".parametrizations")[0] or "the model"] = kind
    return found


def known_kind(module: nn.Module) -> str | None:
    """What ``micro_batch_warnings`` says that a module is; None where it does not name it."""
    if not module.training:
        return None
    kind = type(module).__name__
    # InstanceNorm normalises each sample alone, but may keep running statistics.
    if isinstance(module, _NormBase) and (
        module.track_running_stats or not kind.startswith("InstanceNorm")
    ):
        return kind
    hooks = module._forward_pre_hooks.values()
    if isinstance(module, _SpectralNorm) or any(isinstance(h, SpectralNorm) for h in hooks):
        return "spectral norm"
    return None
