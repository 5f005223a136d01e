"""Whether the stored state of an optimiser is of the form that another config's optimiser keeps.

Decided by behaviour: the optimiser of the config takes a step on parameters of two elements per
dimension, and its state is compared with the stored one by names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from train.exits import RunError
from train.optim.optim_config import OptimConfig
from train.optim.optimizer import build_optimizer
from train.optim.probe import update

_LIKE_PARAMETER, _OTHER_TENSOR, _VALUE = "like its parameter", "another tensor", "a value"
Form = dict[str, str]
"""The kind of each entry of one parameter's state, by name."""


def state_that_fits(
    config: OptimConfig,
    stored: Mapping[str, Mapping[str, Any]],
    shapes: Mapping[str, torch.Size],
) -> dict[str, dict[str, Any]] | None:
    """The entries of ``stored`` that the optimiser of ``config`` keeps; None where it keeps one
    that is missing or of another kind for some parameter, so that it must start without state.

    ``stored`` holds, by parameter name and state name, a (shape, dtype) pair or a JSON value;
    ``shapes`` are those of the parameters.
    """
    forms = _forms(config, {len(shape) for shape in shapes.values()})
    if forms is None:
        return {name: dict(entries) for name, entries in stored.items()}
    found = {}
    for name, entries in stored.items():
        form = forms.get(len(shapes[name]), {}) if name in shapes else {}
        if not form or any(
            _kind_of_stored(entries.get(key), shapes[name]) != kind for key, kind in form.items()
        ):
            return None
        found[name] = {key: entries[key] for key in form}
    return found


def _forms(config: OptimConfig, dimensions: set[int]) -> dict[int, Form] | None:
    """The form of the state by number of dimensions; None where the step cannot be taken."""
    model = nn.Module()
    for number in dimensions:
        model.register_parameter(f"weight_{number}", nn.Parameter(torch.zeros([2] * number)))
    try:
        gradients = [torch.ones_like(parameter) for parameter in model.parameters()]
        optimizer = update(partial(build_optimizer, config), model, [gradients])
    except (RunError, RuntimeError, ValueError, TypeError):  # it takes other parameters only
        return None
    return {
        parameter.dim(): {
            key: _kind(value, parameter.shape)
            for key, value in optimizer.state.get(parameter, {}).items()
            if value is not None
        }
        for parameter in model.parameters()
    }


def _kind(value: Any, shape: torch.Size) -> str:
    if not isinstance(value, Tensor):
        return _VALUE
    return _LIKE_PARAMETER if value.shape == shape else _OTHER_TENSOR


def _kind_of_stored(piece: Any, shape: torch.Size) -> str | None:
    if piece is None:
        return None
    if not isinstance(piece, tuple):
        return _VALUE
    return _LIKE_PARAMETER if piece[0] == shape else _OTHER_TENSOR
