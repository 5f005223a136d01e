"""Trained models for use elsewhere: parameters alone, or form and parameters together.

An export is a directory with

    model.safetensors   parameters and buffers by fully qualified name
    model.pt2           a ``torch.export`` program: form and parameters, no Python class needed
    export.json         the task's reference, the config, and where the weights come from

:func:`load` builds the task's own module from ``export.json`` and ``model.safetensors``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config.load import task_config
from train.exits import DataError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from train.tasks.base import Task

PARAMETERS, PROGRAM, DESCRIPTION = "model.safetensors", "model.pt2", "export.json"


def export_parameters(model: nn.Module, directory: Path) -> Path:
    """Writes parameters and persistent buffers; tensors shared by modules are stored once."""
    from safetensors.torch import save_model

    path = directory / PARAMETERS
    save_model(model, str(path))
    return path


def export_program(model: nn.Module, task: Task, directory: Path) -> Path:
    """Writes a ``torch.export`` program whose first dimension (batch) of every input is free."""
    import torch
    from torch.export import Dim, export, save

    try:
        inputs = task.example_inputs()
    except NotImplementedError:
        raise UsageError(
            "The task has no example_inputs(), without which no program can be exported; "
            "implement it, or ask for --form parameters."
        ) from None
    batch = Dim("batch", min=1)
    dynamic = tuple({0: batch} if isinstance(i, torch.Tensor) else None for i in inputs)
    program = export(model.eval(), inputs, dynamic_shapes=dynamic)
    path = directory / PROGRAM
    save(program, path)
    return path


def write_description(directory: Path, config: dict[str, Any], source: dict[str, Any]) -> Path:
    """Writes what ``load`` needs besides the parameters."""
    path = directory / DESCRIPTION
    text = json.dumps({"task": config["task"]["use"], "config": config, **source}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def load(path: str | Path) -> nn.Module:
    """The module of an export directory, in evaluation mode, on the CPU.

    The task named in it must be importable. Raises UsageError where ``path`` is no export, and
    DataError where the parameters do not fit the module.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    directory = Path(path)
    try:
        description = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
        values = description["config"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{directory} is no export of isorun ({DESCRIPTION}: {error}); "
            "name a directory that `python -m train export` wrote."
        ) from None
    model = task_config(values, f"{directory / DESCRIPTION}").build_model()
    try:
        load_model(model, str(directory / PARAMETERS))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise DataError(
            f"The parameters in {directory / PARAMETERS} do not fit the task's model: {error}; "
            "use the task's code as it was when it was exported."
        ) from error
    return model.eval()
