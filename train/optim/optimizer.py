"""Builds the optimiser, from a name or a dotted path, with its parameter groups."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from train.exits import UsageError
from train.optim.arguments import optimizer_arguments
from train.optim.groups import ParameterSettings
from train.optim.optim_config import NAMES, OptimConfig

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


def build_optimizer(
    config: OptimConfig,
    model: nn.Module,
    settings: Mapping[str, ParameterSettings] | None = None,
    origin: str = "default",
) -> Optimizer:
    """The optimiser over the model's trainable parameters, in groups with the same ``settings``,
    by name; without them all parameters are in one group.

    Fused if the class and the devices support it. ``origin`` is where ``optim.use`` was set, for
    error messages. Raises UsageError for an unknown class or unsuitable arguments.
    """
    cls = _find(config.use, origin)
    accepted = inspect.signature(cls).parameters
    arguments = optimizer_arguments(config, accepted, origin)
    if settings is None:
        alike = ParameterSettings(weight_decay=config.weight_decay)
        settings = {name: alike for name, _ in model.named_parameters()}
    fuses_shards = _fuses_shards(cls, model)
    if {"fused", "foreach"}.isdisjoint(arguments) and "fused" in accepted:
        arguments["fused"] = fuses_shards and _fusible(model)
    if arguments.get("fused") and not fuses_shards:
        raise UsageError(
            f"optim.options.fused is true, but torch's fused {cls.__name__} does not update the "
            "sharded parameters of strategy=fsdp2; remove it."
        )
    named = f"The optimiser {config.use!r} (optim.use, {origin}) rejects"
    groups = parameter_groups(model, settings)
    optimizer = _made(cls, groups, arguments, f"{named} its arguments")
    for index, group in enumerate(config.groups):
        if overrides := group.overrides():  # a constructor looks at its own arguments alone
            what = f"{named} {', '.join(overrides)} of optim.groups.{index}"
            _made(cls, parameter_groups(model, settings), arguments | overrides, what)
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise UsageError(
            f"The optimiser {config.use!r} (optim.use, {origin}) switches the model between two "
            "sets of weights by its train() and eval(), as schedule-free ones do, but a checkpoint "
            "and an evaluation use the weights that are trained; use another optimiser, with "
            "ema.decay for an average of weights."
        )
    return optimizer


def _made(
    cls: Callable[..., Optimizer], groups: list[dict[str, Any]], arguments: Any, rejects: str
) -> Optimizer:
    from torch.optim import Optimizer

    try:
        made: object = cls(groups, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{rejects}: {str(error).rstrip('.')}.") from error
    if not isinstance(made, Optimizer):
        raise UsageError(
            f"{rejects.partition(' rejects')[0]} returns a {type(made).__name__} when it is "
            "called, but a run has one torch.optim.Optimizer; several ones, as of a GAN, are out "
            "of scope."
        )
    return made


def _find(use: str, origin: str) -> Callable[..., Optimizer]:
    from torch.optim import Optimizer

    from train.imports import import_class

    reference = NAMES.get(use, use)
    found: Callable[..., Optimizer] = import_class(reference, Optimizer, f"optim.use ({origin})")
    return found


def _fuses_shards(cls: Any, model: nn.Module) -> bool:
    """Whether a fused step works on these parameters. Of torch's fused kernels, only Adam's and
    AdamW's take DTensors (torch 2.13)."""
    from torch.distributed.tensor import DTensor
    from torch.optim import Adam, AdamW

    is_sharded = any(isinstance(p, DTensor) for p in model.parameters() if p.requires_grad)
    return not is_sharded or (isinstance(cls, type) and issubclass(cls, (Adam, AdamW)))


def _fusible(model: nn.Module) -> bool:
    """Whether torch's fused kernels support all trainable parameters."""
    return all(
        p.is_floating_point() and p.device.type in ("cpu", "cuda")
        for p in model.parameters()
        if p.requires_grad
    )


def parameter_groups(
    model: nn.Module, settings: Mapping[str, ParameterSettings]
) -> list[dict[str, Any]]:
    """Parameter groups with each trainable parameter once, from ``settings`` by name.

    Sharded and full parameters are in separate groups, because torch updates a group at once.
    Raises UsageError if no parameter is trainable.
    """
    from torch.distributed.tensor import DTensor

    groups: dict[tuple[bool, tuple[int, ...]], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = not isinstance(parameter, DTensor), settings[name].order
            group = groups.setdefault(key, {"params": [], **settings[name].as_group()})
            group["params"].append(parameter)
    if not groups:
        raise UsageError(
            "The model has no trainable parameter; set requires_grad=True on at least one."
        )
    return [groups[key] for key in sorted(groups)]


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Sets each group's learning rate to ``rate`` times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)


def state_settings(config: OptimConfig) -> dict[str, Any]:
    """The settings that decide which state the optimiser keeps, as JSON values."""
    return config.model_dump(mode="json", include={"use", "options", "momentum"})


def skips_on_device(optimizer: Optimizer) -> bool:
    """Whether a step can be skipped by a flag on the device, without a device synchronisation.

    True for torch's fused Adam and AdamW only: fused SGD leaves its momentum uninitialised if the
    first step is skipped.
    """
    from torch.optim import Adam, AdamW

    return isinstance(optimizer, (Adam, AdamW)) and all(
        group.get("fused") for group in optimizer.param_groups
    )


# Choices of the implementation, which do not change results.
_SWITCHES = {"fused", "foreach", "capturable", "differentiable", "maximize"}


def param_group_values(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The values of an optimiser's parameter groups that JSON can hold: options and, for some
    optimisers (Prodigy, schedule-free), state."""
    kinds = (bool, int, float, str, type(None))
    return [
        {key: value for key, value in group.items() if isinstance(value, kinds)}
        for group in optimizer.param_groups
    ]


def restore_param_group_values(
    optimizer: Optimizer,
    config: OptimConfig,
    stored: list[dict[str, Any]],
    former_options: Iterable[str] = (),
) -> None:
    """Restores what ``param_group_values`` returned, except values that the config sets or, as
    ``former_options``, has set before."""
    configured = {"params", "lr", "weight_decay", "momentum", "eps", "lr_factor"}
    configured |= {*config.options, *_SWITCHES}
    configured |= set(former_options)
    for index, group in enumerate(optimizer.param_groups):
        values = stored[index] if index < len(stored) else {}
        if _settings(values) != _settings(group):  # FSDP2 has groups for scalars
            alike = (g for g in stored if _settings(g) == _settings(group))
            values = next(alike, values)
        group.update({key: value for key, value in values.items() if key not in configured})


def _settings(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return group.get("weight_decay"), group.get("lr_factor", 1.0)
