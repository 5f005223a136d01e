"""Weights in files of other programs: safetensors, one file or several, and ``torch.save``.

They may be of a stranger. safetensors has no code; a file of ``torch.save`` is read with
``weights_only``, after a check that it is a zip file without compression. A tensor is read only
where a rank needs it: both formats are mapped into memory.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checkpoint.damage import DamagedError
from train.checkpoint.stored_tensor import zip_fault
from train.checkpoint.weight_match import Entry
from train.exits import first_line
from train.files import is_plain_name, open_regular
from train.json_files import read_object, shown

if TYPE_CHECKING:
    from torch import Tensor

    from train.distributed.shard import Shard

PARAMETERS, INDEX = "model.safetensors", "model.safetensors.index.json"
"""As our export and Hugging Face's ``save_pretrained`` name them; the index names several files."""
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
_LARGEST_LIST = 64 << 20  # bytes; the list of entries in a zip file
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip
"""safetensors' names of dtypes; others keep theirs and match no tensor of a model."""
Reader = Callable[[str, tuple[slice, ...]], "Tensor"]
"""A part of a named tensor."""


def indexed_files(index: Path) -> dict[str, str]:
    """The file of each tensor, by its name, of an index of several safetensors files. Raises
    DamagedError and OSError."""
    try:
        files = read_object(index.resolve(), {"weight_map": dict})["weight_map"]
    except ValueError as error:
        raise DamagedError(f"{index} cannot be used ({error})") from None
    for name, file in files.items():
        if not is_plain_name(file) or not file.endswith(".safetensors"):
            raise DamagedError(f"{index} has {shown(name)} in {shown(file)}, which is not a file")
    return dict(files)


def entries_of(path: Path) -> dict[str, Entry]:
    """Shape and dtype of each tensor of a file. Raises DamagedError and OSError."""
    if path.suffix in TORCH_SUFFIXES:
        return {
            name: Entry(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in _load(path).items()
        }
    with _open_safetensors(path) as file:
        slices = ((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118
        return {
            name: Entry(tuple(s.get_shape()), _DTYPES.get(s.get_dtype(), s.get_dtype()))
            for name, s in slices
        }


def read_into(path: Path, targets: Mapping[str, Shard]) -> None:
    """Copies the parts of tensors of a file that this rank holds, by the names in the file. Raises
    DamagedError and OSError."""
    import torch

    with torch.no_grad(), _reader(path) as read:
        for name, shard in targets.items():
            for (offsets, sizes), view in shard.chunks():
                if view.numel():
                    window = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
                    view.copy_(read(name, window))


@contextmanager
def _reader(path: Path) -> Iterator[Reader]:
    if path.suffix in TORCH_SUFFIXES:
        tensors = _load(path)
        yield lambda name, window: tensors[name][window]
        return
    with _open_safetensors(path) as file:
        # A tensor without dimensions has no slices.
        yield lambda name, window: file.get_slice(name)[window] if window else file.get_tensor(name)


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    os.close(open_regular(path.resolve()))  # a FIFO would block
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, ValueError, LookupError) as error:
        raise DamagedError(f"{path} cannot be read ({first_line(error)})") from error


def _load(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of ``torch.save``, mapped into memory, without what modules return from
    ``get_extra_state``, which need not be tensors."""
    import torch

    from train.distributed.shard import is_extra_state

    with os.fdopen(open_regular(path.resolve()), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if fault := zip_fault(file, 0, size, _LARGEST_LIST):
            raise DamagedError(f"{path} is not a file of torch.save that can be used ({fault})")
    try:
        loaded = torch.load(path.resolve(), map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise DamagedError(
            f"{path} has values that torch.load does not read with weights_only=True"
        ) from None
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} cannot be read ({first_line(error)})") from error
    if not isinstance(loaded, Mapping):
        raise DamagedError(f"{path} has a {type(loaded).__name__}, not a state_dict")
    tensors = {n: v for n, v in loaded.items() if not isinstance(n, str) or not is_extra_state(n)}
    for name, value in tensors.items():
        if not isinstance(name, str) or not _is_plain(torch, value):
            raise DamagedError(
                f"{path} is not a state_dict of tensors: {shown(name)} is a "
                f"{type(value).__name__}; save the state_dict of the model alone"
            )
    return tensors


def _is_plain(module: Any, value: object) -> bool:
    """Whether a value is a tensor in memory whose elements can be copied."""
    if type(value) not in (module.Tensor, module.nn.Parameter):
        return False
    tensor: Any = value
    return bool(tensor.layout == module.strided and not tensor.is_quantized and not tensor.is_meta)
