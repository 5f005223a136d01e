"""Builds the optimiser, from a name or a dotted path, with its parameter groups."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PydanticUserError, TypeAdapter, ValidationError

from train.exits import UsageError
from train.section import Section, non_semantic

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

NAMES = {
    "adamw": "torch.optim:AdamW",
    "adam": "torch.optim:Adam",
    "sgd": "torch.optim:SGD",
    "adagrad": "torch.optim:Adagrad",
    "rmsprop": "torch.optim:RMSprop",
    "nadam": "torch.optim:NAdam",
    "radam": "torch.optim:RAdam",
    "adafactor": "torch.optim:Adafactor",
}


class OptimConfig(Section):
    """The optimiser and gradient clipping."""

    use: str = "adamw"
    """A name (adamw, adam, sgd, adagrad, rmsprop, nadam, radam, adafactor) or the dotted path
    of a torch.optim.Optimizer class, such as my_project.optim:Lion."""

    lr: float = Field(1e-3, gt=0.0)
    """Base learning rate; the schedule multiplies it by a factor."""

    weight_decay: float = Field(0.0, ge=0.0)
    """Weight decay of all parameters except the kinds in ``no_decay``."""

    no_decay: list[Literal["norm", "bias", "embedding"]] = ["norm", "bias", "embedding"]
    """Kinds of parameters without weight decay: those of normalisation layers, biases, and
    embedding tables (a head tied to an embedding counts as the embedding)."""

    betas: list[float] | None = Field(None, min_length=2, max_length=2)
    """Adam's two decay rates; null for the optimiser's own default."""

    eps: float | None = Field(None, gt=0.0)
    """Adam's epsilon; null for the optimiser's own default."""

    momentum: float | None = Field(None, ge=0.0)
    """SGD's momentum; null for the optimiser's own default."""

    options: dict[str, Any] = {}
    """Further keyword arguments for the optimiser's constructor."""

    clip_norm: float | None = Field(None, gt=0.0)
    """Clip gradients to this global L2 norm; null for no clipping."""

    max_skipped_steps: int = non_semantic(10, ge=0)
    """A step with a non-finite loss or gradient norm is skipped; more than this many in a row end
    the run with exit code 78."""


def build_optimizer(config: OptimConfig, model: nn.Module, origin: str = "default") -> Optimizer:
    """The optimiser over the model's trainable parameters, in one or two parameter groups.

    Fused if the class and the devices support it. ``origin`` is where ``optim.use`` was set, for
    error messages. Raises UsageError for an unknown class or unsuitable arguments.
    """
    cls = _find(config.use, origin)
    accepted = inspect.signature(cls).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    arguments: dict[str, Any] = {"lr": config.lr}
    for name in ("lr", "weight_decay", "betas", "eps", "momentum"):
        # The schedule sets lr and parameter_groups weight_decay, whatever the options are.
        set_above = name in ("lr", "weight_decay") or getattr(config, name) is not None
        if name in config.options and set_above:
            raise UsageError(
                f"optim.options.{name} is {config.options[name]!r}, but optim.{name} decides it; "
                f"set optim.{name}, and remove it from optim.options."
            )
    for name in ("betas", "eps", "momentum"):
        value = getattr(config, name)
        if value is not None:
            arguments[name] = tuple(value) if name == "betas" else value
    arguments |= config.options
    unknown = [name for name in arguments if name not in accepted and not anything]
    if unknown:
        field = unknown[0] if unknown[0] not in config.options else f"options.{unknown[0]}"
        raise UsageError(
            f"optim.{field} is not an argument of the optimiser {config.use!r} ({origin}), which "
            f"takes {', '.join(name for name in accepted if name != 'params')}; remove it."
        )
    for name, value in config.options.items():
        if name in accepted and (fault := _misfit(value, accepted[name])):
            raise UsageError(
                f"optim.options.{name} is {value!r}, which is not what the optimiser "
                f"{config.use!r} ({origin}) takes ({fault}); correct or remove it."
            )
    fuses_shards = _fuses_shards(cls, model)
    if {"fused", "foreach"}.isdisjoint(arguments) and "fused" in accepted:
        arguments["fused"] = fuses_shards and _fusible(model)
    if arguments.get("fused") and not fuses_shards:
        raise UsageError(
            f"optim.options.fused is true, but torch's fused {cls.__name__} does not update the "
            "sharded parameters of strategy=fsdp2; remove it."
        )
    try:
        return cls(parameter_groups(config, model), **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"The optimiser {config.use!r} (optim.use, {origin}) rejects its arguments: {error}."
        ) from error


def _misfit(value: Any, argument: inspect.Parameter) -> str | None:
    """Why a value from a config is none of the argument's type, which would end the first step with
    an error of torch; None where it is, or where the type is not known."""
    if argument.annotation is argument.empty or value == argument.default:
        return None
    try:
        # The rules for JSON: a list is a tuple, an integer is a float, but no text is a number.
        adapter = TypeAdapter(argument.annotation, config={"arbitrary_types_allowed": True})
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        return str(error.errors(include_url=False)[0]["msg"])
    except (PydanticUserError, TypeError, NameError):  # a type that only the optimiser knows
        return None
    return None


def _find(use: str, origin: str) -> Callable[..., Optimizer]:
    from torch.optim import Optimizer

    from train.imports import import_class

    reference = NAMES.get(use, use)
    if ":" not in reference:
        from train.suggest import did_you_mean

        raise UsageError(
            f"optim.use must be one of {', '.join(NAMES)} or a dotted path such as "
            f"my_project.optim:Lion, but is {use!r} ({origin}){did_you_mean(use, NAMES)}"
        )
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


def parameter_groups(config: OptimConfig, model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups with and without weight decay: each trainable parameter once.

    Sharded and full parameters are in separate groups, because torch updates a group at once.
    Raises UsageError if no parameter is trainable.
    """
    from torch.distributed.tensor import DTensor

    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter, kind in _kinds(model):
        if parameter.requires_grad:
            key = not isinstance(parameter, DTensor), kind in config.no_decay
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise UsageError(
            "The model has no trainable parameter; set requires_grad=True on at least one."
        )
    return [
        {"params": groups[key], "weight_decay": 0.0 if key[1] else config.weight_decay}
        for key in sorted(groups)
    ]


def _kinds(model: nn.Module) -> list[tuple[nn.Parameter, str]]:
    """Each distinct parameter with its kind: norm, embedding, bias or weight.

    A module is a normalisation layer if its class name contains "norm", so that custom ones count.
    A shared parameter has the first kind that is not "weight" (a tied head: embedding).
    """
    from torch import nn

    found: dict[int, tuple[nn.Parameter, str]] = {}
    for module in model.modules():
        name = type(module).__name__.lower()
        for leaf, parameter in module.named_parameters(recurse=False):
            if "norm" in name:
                kind = "norm"
            elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                kind = "embedding"
            else:
                kind = "bias" if leaf.endswith("bias") else "weight"
            earlier = found.get(id(parameter))
            if earlier is None or earlier[1] == "weight":
                found[id(parameter)] = (parameter, kind)
    return list(found.values())


def set_learning_rate(optimizer: Optimizer, base: float, factor: float) -> float:
    """Sets every group's learning rate to ``base * factor`` and returns it."""
    for group in optimizer.param_groups:
        group["lr"] = base * factor
    return base * factor


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
    configured = {"params", "lr", "weight_decay", "momentum", "eps", *config.options, *_SWITCHES}
    configured |= set(former_options)
    for index, group in enumerate(optimizer.param_groups):
        values = stored[index] if index < len(stored) else {}
        if values.get("weight_decay") != group["weight_decay"]:  # FSDP2 has groups for scalars
            alike = (g for g in stored if g.get("weight_decay") == group["weight_decay"])
            values = next(alike, values)
        group.update({key: value for key, value in values.items() if key not in configured})
