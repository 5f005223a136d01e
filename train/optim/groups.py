"""Which parameters share a learning rate, weight decay and further settings.

The settings are a function of the model as it was built, by parameter name, so that they do not
depend on how the parameters are sharded later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from train.exits import UsageError
from train.optim.optim_config import OptimConfig
from train.suggest import did_you_mean, listed

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ParameterSettings:
    """What the optimiser does differently for some parameters."""

    weight_decay: float
    lr_factor: float = 1.0
    order: tuple[int, ...] = ()
    """The position of their parameter group among the others."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the optimiser."""

    def as_group(self) -> dict[str, Any]:
        """The keys of a parameter group of torch."""
        factor = {} if self.lr_factor == 1.0 else {"lr_factor": self.lr_factor}
        return {"weight_decay": self.weight_decay, **factor, **self.overrides}


def parameter_settings(
    config: OptimConfig,
    model: nn.Module,
    blocks: Sequence[nn.Module] = (),
    origin: str = "default",
) -> dict[str, ParameterSettings]:
    """The settings of each trainable parameter of a model, by name.

    The first of ``config.groups`` that matches one of a parameter's names decides. ``blocks`` are
    the model's layers in their order, for ``config.layer_decay``. ``origin`` is where
    ``optim.groups`` was set, for error messages. Raises UsageError for a pattern that matches no
    trainable parameter, or only those of earlier groups, and where a model without blocks has
    layer-wise decay.
    """
    kinds = parameter_kinds(model)
    depths = _depths(model, blocks, kinds) if config.layer_decay is not None else {}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found, all_names = dict[str, ParameterSettings](), list[str]()
    matched, used = set[int](), set[int]()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = names[id(parameter)]
        all_names += own
        matching = [i for i, group in enumerate(config.groups) if any(map(group.matches, own))]
        matched |= set(matching)
        used |= set(matching[:1])
        group = config.groups[matching[0]] if matching else None
        factor, decays = 1.0, kinds[name] not in config.no_decay
        decay = config.weight_decay if decays else 0.0
        if group:
            if group.lr is not None:
                factor = group.lr / config.lr
            elif group.lr_factor is not None:
                factor = group.lr_factor
            if group.weight_decay is not None:
                decay, decays = group.weight_decay, True
        depth = depths.get(name, 0)
        if config.layer_decay is not None:
            factor *= config.layer_decay**depth
        found[name] = ParameterSettings(
            order=(matching[0] if matching else -1, depth, not decays),
            weight_decay=decay,
            lr_factor=factor,
            overrides=group.overrides() if group else {},
        )
    for index, group in enumerate(config.groups):
        if index not in matched:
            raise UsageError(
                f"optim.groups.{index}.pattern is {group.pattern!r} ({origin}), which matches no "
                f"trainable parameter; the model has {listed(all_names, 5)}"
                f"{did_you_mean(group.pattern, all_names)}"
            )
        if index not in used:
            raise UsageError(
                f"optim.groups.{index}.pattern is {group.pattern!r} ({origin}), but all parameters "
                "that it matches belong to earlier entries, of which the first counts; move it "
                "before them, or remove it."
            )
    return found


def parameter_kinds(model: nn.Module) -> dict[str, str]:
    """The kind of each distinct parameter, by its first name: norm, embedding, bias or weight.

    Those of normalisation layers, and all other vectors and scalars but biases and embeddings, are
    of the kind norm: gains and shifts under any name, scales of layers and logits. A vector may
    have further dimensions of size 1, as in (1, 1, width). Weights of linear layers and
    convolutions never are, whatever their class is called. A shared parameter has the first kind
    that is not "weight" (a tied head: embedding).
    """
    found: dict[int, tuple[str, str]] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            kind = _kind(module, leaf, parameter)
            name = f"{prefix}.{leaf}" if prefix else leaf
            earlier = found.get(id(parameter))
            if earlier is None or earlier[1] == "weight":
                found[id(parameter)] = (earlier[0] if earlier else name, kind)
    return dict(found.values())


def _kind(module: nn.Module, leaf: str, parameter: nn.Parameter) -> str:
    """The kind of a parameter of this module itself, by its role and its shape."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    multiplies = isinstance(module, nn.Linear | nn.Bilinear | nn.RNNBase | _ConvNd)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if "norm" in type(module).__name__.lower() and not multiplies:
        return "norm"
    if leaf.endswith("bias") or "bias" in leaf.split("_"):  # bias_ih_l0, relative_bias_table
        return "bias"
    is_vector = sum(size > 1 for size in parameter.shape) < 2
    if parameter.dim() < 2 or (is_vector and not multiplies):
        return "norm"
    return "weight"


def _depths(
    model: nn.Module, blocks: Sequence[nn.Module], kinds: Mapping[str, str]
) -> dict[str, int]:
    """How many layers are above each parameter, by name: 0 for what comes after the blocks, then
    the blocks from the last to the first, then embeddings and what comes before the blocks."""
    if not blocks:
        raise UsageError(
            "optim.layer_decay is set, but the model has no blocks: no module list, none named by "
            "the task's blocks(model), none by fsdp2.blocks; name them, or set "
            "optim.layer_decay=null."
        )
    of_block = {
        id(parameter): len(blocks) - index
        for index, block in reversed(list(enumerate(blocks)))
        for parameter in block.parameters()
    }
    found, is_before = {}, True
    for name, parameter in model.named_parameters():
        depth = of_block.get(id(parameter))
        is_before = is_before and depth is None
        if depth is None:
            depth = len(blocks) + 1 if is_before or kinds[name] == "embedding" else 0
        found[name] = depth
    return found
