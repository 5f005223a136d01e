"""What a checkpoint holds: named tensors of model, optimiser and average of weights.

Names do not depend on the placement: ``model.<fully qualified name>``,
``optim.<parameter name>.<state>`` and ``ema.<parameter name>``. Optimiser state that is no
tensor goes into the manifest's JSON. Random states are not stored: they are seeded by position.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from train.checkpoint import dcp
from train.ema import Ema
from train.engine import parameter_names
from train.exits import ResumeRefusedError
from train.optim import named_state


def collect(
    model: nn.Module, optimizer: Optimizer, ema: Ema | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors by name, not copied, and the optimiser's other state as JSON values."""
    tensors, values = model_tensors(model), {}
    for name, state in named_state(optimizer, parameter_names(model)).items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optim.{name}.{key}"] = value
            else:
                values[f"{name}.{key}"] = value
    if ema is not None:
        tensors |= {f"ema.{name}": average for name, average in ema.averages.items()}
    return tensors, values


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and persistent buffers; tensors with several names only once."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[f"model.{name}"] = tensor.detach()
    return tensors


def restore(
    directory: Path,
    values: Mapping[str, Any],
    model: nn.Module,
    optimizer: Optimizer,
    ema: Ema | None,
    group: Any = None,
) -> None:
    """Fills model, optimiser and average from a checkpoint; collective over ``group``.

    Raises ResumeRefusedError where the checkpoint is one of another model.
    """
    stored = dcp.shapes(directory)
    targets = model_tensors(model)
    if ema is not None:
        targets |= {f"ema.{name}": average for name, average in ema.averages.items()}
    _check_same(directory, targets, stored)
    names = parameter_names(model)
    state: dict[int, dict[str, Any]] = {}
    order = [p for group_ in optimizer.param_groups for p in group_["params"]]
    for index, parameter in enumerate(order):
        prefix = f"{names[id(parameter)]}."
        entries: dict[str, Any] = {}
        for name, (shape, dtype) in stored.items():
            if name.startswith(f"optim.{prefix}"):
                key = name.removeprefix(f"optim.{prefix}")
                device = parameter.device if shape == parameter.shape else None
                entries[key] = targets[name] = torch.empty(shape, dtype=dtype, device=device)
        entries |= {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
        if entries:
            state[index] = entries
    with torch.no_grad():
        dcp.read(targets, directory, group)
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def restore_model(directory: Path, model: nn.Module, *, averaged: bool, group: Any = None) -> None:
    """Fills only the model; with ``averaged`` its parameters come from the average of weights."""
    targets = model_tensors(model)
    if averaged:
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        targets = {
            ("ema." if name.removeprefix("model.") in trainable else "model.")
            + name.removeprefix("model."): tensor
            for name, tensor in targets.items()
        }
    _check_same(directory, targets, dcp.shapes(directory), complete=False)
    with torch.no_grad():
        dcp.read(targets, directory, group)


def _check_same(
    directory: Path,
    targets: Mapping[str, Tensor],
    stored: Mapping[str, tuple[torch.Size, torch.dtype]],
    *,
    complete: bool = True,
) -> None:
    differences = [f"{name} is not in the checkpoint" for name in targets if name not in stored]
    if complete:
        kinds = ("model.", "ema.")
        differences += [
            f"{name} is only in the checkpoint"
            for name in stored
            if name.startswith(kinds) and name not in targets
        ]
    differences += [
        f"{name} has shape {tuple(stored[name][0])} in the checkpoint and "
        f"{tuple(tensor.shape)} in the model"
        for name, tensor in targets.items()
        if name in stored and stored[name][0] != tensor.shape
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ResumeRefusedError(
            f"The checkpoint {directory} is of another model: "
            f"{'; '.join(differences[:3])}{more}; use the code and config that wrote it, or "
            "start a new run in another run.dir."
        )
