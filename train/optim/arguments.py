"""The arguments of an optimiser's constructor, from the config."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from train.exits import UsageError
from train.optim.optim_config import OptimConfig


def optimizer_arguments(
    config: OptimConfig, accepted: Mapping[str, inspect.Parameter], origin: str
) -> dict[str, Any]:
    """The keyword arguments that the config sets, except weight decay, which the parameter groups
    have. ``accepted`` are the constructor's, ``origin`` is where ``optim.use`` was set.

    Raises UsageError for one that the constructor does not accept, also in ``optim.groups``.
    """
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
    for index, group in enumerate(config.groups):
        for name in group.overrides():
            if name not in accepted and not anything:
                raise UsageError(
                    f"optim.groups.{index}.{name} is not an argument of the optimiser "
                    f"{config.use!r} ({origin}); remove it."
                )
    return arguments


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
