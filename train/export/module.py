"""Exports trained models as safetensors and as ``torch.export`` programs, and loads them.

An export is a directory with

    model.safetensors   parameters and buffers by fully qualified name, and tensors of extra state
    model.pt2           a ``torch.export`` program: graph and parameters, independent of the task
    export.json         the task's reference, the config, the source checkpoint, and the values that
                        modules return from get_extra_state

:func:`load` builds the task's module from ``export.json`` and ``model.safetensors``.
"""

from __future__ import annotations

import io
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config.load import task_config
from train.config.trust import TASK_SECTIONS, dotted_paths
from train.exits import DataError, UsageError, first_line, sys_exit_refused
from train.files import create, open_regular, refuse_irregular, write_json
from train.imports import import_path_restored
from train.json_files import has_fields, read_object

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from train.tasks.base import Task

PARAMETERS, PROGRAM, DESCRIPTION = "model.safetensors", "model.pt2", "export.json"


def export_parameters(model: nn.Module, directory: Path) -> Path:
    """Writes parameters, persistent buffers and the tensors of extra state; shared tensors are
    stored once. Returns the path."""
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    path = directory / PARAMETERS
    os.close(create(path))
    mode = path.stat().st_mode  # by the umask; safetensors replaces the file by one with 0600
    try:
        save_model(_Tensors(model), str(path))  # type: ignore[arg-type]
    except SafetensorError as error:
        raise _of_system(error) or error from error
    path.chmod(stat.S_IMODE(mode))
    return path


def _of_system(error: Exception) -> OSError | None:
    """The error of the operating system that an error of a library in Rust names."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


class _Tensors:
    """A model as safetensors uses it: its state_dict without the extra state that is no tensor."""

    def __init__(self, model: nn.Module) -> None:
        from train.checkpoint.extra_state import get_extra_state

        self._model = model
        self.extra = get_extra_state(model).tensors
        """Tensors of the extra state."""

    def state_dict(self) -> dict[str, Tensor]:
        # Copies, since safetensors drops one of two tensors that share memory.
        return {**self._own(), **{name: tensor.clone() for name, tensor in self.extra.items()}}

    def _own(self) -> dict[str, Tensor]:
        from train.distributed.shard import is_extra_state

        return {n: t for n, t in self._model.state_dict().items() if not is_extra_state(n)}

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool) -> Any:
        from train.checkpoint.buffers import adopt_buffers
        from train.distributed.shard import is_extra_state

        self.extra = {name: t for name, t in state_dict.items() if is_extra_state(name)}
        own = {name: t for name, t in state_dict.items() if not is_extra_state(name)}
        adopt_buffers(self._model, {name: (t.shape, t.dtype) for name, t in own.items()})
        missing, unexpected = self._model.load_state_dict(own, strict=strict)
        return [name for name in missing if not is_extra_state(name)], unexpected


def example_inputs(task: Task) -> tuple[Any, ...] | None:
    """The inputs that the export of a program needs; None where the task has none."""
    try:
        return task.example_inputs()
    except NotImplementedError:
        return None


def make_program(model: nn.Module, inputs: tuple[Any, ...]) -> ExportedProgram:
    """A ``torch.export`` program with a dynamic first dimension (batch) of all inputs.

    Raises UsageError if torch.export does not support the model or the inputs.
    """
    import torch
    from torch.export import Dim, export

    batch = Dim("batch", min=1)
    try:
        dynamic = tuple({0: batch} if isinstance(i, torch.Tensor) else None for i in inputs)
        return export(model.eval(), inputs, dynamic_shapes=dynamic)
    except Exception as error:
        raise UsageError(
            f"torch.export cannot export the {type(model).__name__} with the task's "
            f"example_inputs() ({type(error).__name__}: {first_line(error)}); change one of them, "
            "or use --form parameters."
        ) from error


def export_program(program: ExportedProgram, directory: Path) -> Path:
    """Writes a program of ``make_program``. Returns the path."""
    from torch.export import save

    path = directory / PROGRAM
    with _File(create(path), "wb") as file:
        save(program, file)
    if file.error:
        raise file.error
    return path


class _File(io.FileIO):
    """A file that remembers the first error of a write in ``error``. torch's writer of archives
    aborts the process at an error."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            view = memoryview(data)
            try:
                while view:
                    view = view[super().write(view) :]
            except OSError as error:
                self.error = error
        return len(data)


def write_description(
    directory: Path, config: dict[str, Any], source: dict[str, Any], model: nn.Module
) -> Path:
    """Writes ``export.json``. ``source``: further keys on the source checkpoint. Returns the
    path."""
    from train.checkpoint.extra_state import get_extra_state

    path = directory / DESCRIPTION
    extra = get_extra_state(model).values
    kept = {"extra_state": extra} if extra else {}
    write_json(path, {"task": config["task"]["use"], "config": config, **source, **kept})
    return path


def _check_description(description: dict[str, Any]) -> None:
    """Raises ValueError where ``export.json`` lacks what a module is built from."""
    values = description["config"]
    for section, field, kind in (("task", "use", str), ("run", "seed", int)):
        part = values.get(section)
        if not has_fields(part, {field: kind}):
            raise ValueError(f"its config has no {section}.{field}")
    if not isinstance(description.get("extra_state", {}), dict):
        raise ValueError("its extra_state is not an object")


@sys_exit_refused()
@import_path_restored()
def load(path: str | Path, task: type[Task] | None = None, *, trust: bool = False) -> nn.Module:
    """Loads the module of an export directory, in evaluation mode, on the CPU.

    A built-in task is found by its name. Any other is code: pass its class as ``task``, or
    ``trust=True`` to import what the export names, first from the working directory. Raises
    UsageError if ``path`` is not an export or names code that is not trusted, and DataError if the
    parameters do not match the module.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    from train.checkpoint.extra_state import ExtraState, set_extra_state
    from train.distributed.randomness import GlobalRngState
    from train.strategies.meta_init import build_full_model

    directory = Path(path)
    try:
        # A cache of models, such as that of Hugging Face, has links.
        description = read_object((directory / DESCRIPTION).resolve(), {"config": dict})
        values = description["config"]
        _check_description(description)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{directory} is not an export of isorun ({DESCRIPTION}: {error}); "
            "name a directory that `python -m train export` wrote."
        ) from None
    if not trust:
        _refuse_code(directory, values, task)
    of_export = task_config(values, f"{directory / DESCRIPTION}", task)
    generators = GlobalRngState(cuda=True)  # the caller's
    try:
        # Without trust no data is loaded: which files a built-in task reads is the export's choice.
        shapes = _shapes(directory / PARAMETERS) if trust or task is not None else None
        model = build_full_model(of_export, values["run"]["seed"], shapes)
    finally:
        generators.restore()
    tensors = _Tensors(model)
    try:
        os.close(open_regular((directory / PARAMETERS).resolve()))  # a FIFO would block
        load_model(tensors, str(directory / PARAMETERS))  # type: ignore[arg-type]
        extra = ExtraState(description.get("extra_state", {}), tensors.extra)
        set_extra_state(model, extra)
    except (OSError, RuntimeError, SafetensorError) as error:
        text = str(error).replace(_Tensors.__name__, type(model).__name__)
        raise DataError(
            f"The parameters in {directory / PARAMETERS} do not match the task's model: {text}; "
            "use the version of the task that was exported."
        ) from error
    return model.eval()


def _shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of the tensors in a file, by name; empty where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        refuse_irregular(path.resolve())  # a FIFO would block
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return {}


def _refuse_code(directory: Path, values: dict[str, Any], task: type[Task] | None) -> None:
    """Raises UsageError if the config of an export names code other than ``task``."""
    for keys, value in dotted_paths({name: values.get(name) for name in TASK_SECTIONS}):
        key = ".".join(keys)
        if key == "task.use" and task is not None:
            continue
        by_class = ", or pass the task's class as task=" if key == "task.use" else ""
        raise UsageError(
            f"{directory / DESCRIPTION} names the code {value!r} ({key}), which runs "
            f"when it is imported; pass trust=True to train.load if you trust the export{by_class}."
        )
