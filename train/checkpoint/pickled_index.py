"""Reads the ``.metadata`` of ``torch.distributed.checkpoint`` (DCP), a pickle, as data.

A pickle is a program for a small machine. This machine calls nothing and imports nothing: it notes
by name what the pickle would have created, and the notes are read where the index is expected.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from train.json_files import shown

MOST_DIMENSIONS = 64  # of a tensor in torch
_MOST_FIELDS = 64  # of an object; those of DCP have fewer
_DCP = "torch.distributed.checkpoint"
_CLASSES = {
    f"{_DCP}.metadata.{name}"
    for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata",
    )
} | {f"{_DCP}.filesystem._StorageInfo"}  # fmt: skip
_SIZE = "torch.Size"
_FUNCTIONS = {
    _SIZE, f"{_DCP}.metadata._MEM_FORMAT_ENCODING", "torch.serialization._get_layout",
    "pathlib.PosixPath", "pathlib._local.PosixPath", "builtins.getattr",
}  # fmt: skip
"""What a metadata pickle calls. ``getattr``: for an enum member, by early Python 3.11;
``pathlib._local``: by Python 3.13."""


@dataclass(frozen=True)
class _Global:
    """A class or function, by name."""

    name: str


@dataclass(eq=False)
class _Made:
    """What a call or a class would have given, with the state that it would have got."""

    of: str
    arguments: tuple[Any, ...]
    state: Any = None


@dataclass(eq=False)
class _Dict:
    pairs: list[tuple[Any, Any]] = field(default_factory=list)


def read_pickled_index(data: bytes) -> dict[str, Any]:
    """The tensors of a metadata pickle by name, in the form of ``index.json``.

    Raises ValueError if it is not such a pickle, or would need something that is not part of it.
    """
    try:
        metadata = _Machine().run(data)
        stored = {}
        for index, info in _items(_field(metadata, "Metadata", "storage_data")):
            offset = _fields(_made(index, "MetadataIndex")).get("offset")
            if offset is not None:  # a value that is not a tensor has none
                stored[_text(_field(index, "MetadataIndex", "fqn")), _size(offset)] = info
        entries = _items(_field(metadata, "Metadata", "state_dict_metadata"))
        # A pickle can refer to one object many times, in a few bytes each.
        chunks = (_chunks(_text(name), entry) for name, entry in entries)
        if sum(map(len, chunks)) > len(stored):
            raise ValueError("its tensors have more chunks than it has stored")
        return {_text(name): _tensor(_text(name), entry, stored) for name, entry in entries}
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ValueError("it is not DCP metadata") from None


def _chunks(name: str, entry: Any) -> list[Any]:
    if entry.of != f"{_DCP}.metadata.TensorStorageMetadata":
        raise ValueError(f"{shown(name)} is not a tensor")
    chunks = _field(entry, "TensorStorageMetadata", "chunks")
    if not isinstance(chunks, list):
        raise ValueError("it is not DCP metadata")
    return chunks


def _tensor(name: str, entry: Any, stored: Mapping[tuple[str, Any], Any]) -> dict[str, Any]:
    dtype = _made(_field(entry, "TensorStorageMetadata", "properties"), "TensorProperties").state[0]
    chunks = []
    for chunk in _chunks(name, entry):
        offsets = _size(_field(chunk, "ChunkStorageMetadata", "offsets"))
        info = stored[name, offsets]
        values = _fields(_made(info, "_StorageInfo"))
        if values.get("transform_descriptors"):
            raise ValueError(f"{shown(name)} is stored with a transformation")
        chunks.append(
            {
                "offsets": list(offsets),
                "sizes": list(_size(_field(chunk, "ChunkStorageMetadata", "sizes"))),
                "file": values["relative_path"],
                "at": values["offset"],
                "length": values["length"],
            }
        )
    shape = list(_size(_field(entry, "TensorStorageMetadata", "size")))
    return {"dtype": dtype.name.removeprefix("torch."), "shape": shape, "chunks": chunks}


def _made(value: Any, name: str) -> _Made:
    if not isinstance(value, _Made) or value.of.rpartition(".")[2] != name:
        raise ValueError("it is not DCP metadata")
    return value


def _field(value: Any, of: str, name: str) -> Any:
    return _fields(_made(value, of))[name]


def _fields(made: _Made) -> dict[str, Any]:
    if len(_items(made.state)) > _MOST_FIELDS:
        raise ValueError("it is not DCP metadata")
    # Other keys could be nested so deeply that their hash overflows the stack.
    return {key: value for key, value in _items(made.state) if isinstance(key, str)}


def _items(value: Any) -> list[tuple[Any, Any]]:
    if not isinstance(value, _Dict):
        raise ValueError("it is not DCP metadata")
    return value.pairs


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("it is not DCP metadata")
    return value


def _size(value: Any) -> tuple[int, ...]:
    (sizes,) = _made(value, "Size").arguments
    if not isinstance(sizes, tuple) or len(sizes) > MOST_DIMENSIONS:
        raise ValueError("it is not DCP metadata")
    if any(type(size) is not int for size in sizes):
        raise ValueError("it is not DCP metadata")
    return sizes


class _Machine:
    """Runs the instructions of a pickle on names instead of classes and functions."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name == "STOP":
                return self._stack.pop()
            if name in _LITERALS:
                self._stack.append(argument)
            elif name in _PUT:
                at = argument if isinstance(argument, int) else len(self._memo)
                self._memo[at] = self._stack[-1]
            elif name in _GET and isinstance(argument, int):
                self._stack.append(self._memo[argument])
            elif name in _STEPS:
                _STEPS[name](self, argument)
            elif name not in ("PROTO", "FRAME"):
                raise ValueError(f"it has the instruction {name}, which no metadata needs")
        raise ValueError("it has no end")

    def _global(self, argument: str | None) -> None:
        if argument is None:
            name, module = _text(self._stack.pop()), _text(self._stack.pop())
        else:
            module, _, name = argument.partition(" ")
        full = f"{module}.{name}"
        is_dtype = module == "torch" and name.isidentifier()  # its name is looked up elsewhere
        if full not in _CLASSES | _FUNCTIONS and not is_dtype:
            raise ValueError(
                f"it is not safe to load: {shown(full)} is not allowed in a checkpoint"
            )
        self._stack.append(_Global(full))

    def _call(self, allowed: set[str]) -> None:
        arguments, called = self._stack.pop(), self._stack.pop()
        if not isinstance(called, _Global) or called.name not in allowed:
            raise ValueError("it is not safe to load: it calls something that no metadata needs")
        if not isinstance(arguments, tuple):
            raise ValueError("it is not DCP metadata")
        self._stack.append(_Made(called.name, arguments))

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if not isinstance(target, _Made) or target.of not in _CLASSES:
            raise ValueError("it is not safe to load: it changes something that no metadata has")
        target.state = state

    def _since_mark(self) -> list[Any]:
        at = self._marks.pop()
        values = self._stack[at:]
        del self._stack[at:]
        return values

    def _tuple(self, count: int) -> None:
        values = tuple(self._stack[len(self._stack) - count :])
        if len(values) != count:
            raise ValueError("it is not DCP metadata")
        del self._stack[len(self._stack) - count :]
        self._stack.append(values)

    def _append(self, values: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise ValueError("it is not DCP metadata")
        self._stack[-1].extend(values)

    def _set(self, values: list[Any]) -> None:
        self._stack[-1].pairs.extend(zip(values[::2], values[1::2], strict=True))


_Step = Callable[[_Machine, Any], None]
_LITERALS = {
    "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINUNICODE", "UNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_PUT = {"MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"}
_GET = {"GET", "BINGET", "LONG_BINGET"}
_STEPS: dict[str, _Step] = {
    "NONE": lambda m, _: m._stack.append(None),
    "NEWTRUE": lambda m, _: m._stack.append(True),
    "NEWFALSE": lambda m, _: m._stack.append(False),
    "EMPTY_TUPLE": lambda m, _: m._stack.append(()),
    "EMPTY_LIST": lambda m, _: m._stack.append([]),
    "EMPTY_DICT": lambda m, _: m._stack.append(_Dict()),
    "MARK": lambda m, _: m._marks.append(len(m._stack)),
    "TUPLE": lambda m, _: m._stack.append(tuple(m._since_mark())),
    "TUPLE1": lambda m, _: m._tuple(1),
    "TUPLE2": lambda m, _: m._tuple(2),
    "TUPLE3": lambda m, _: m._tuple(3),
    "APPEND": lambda m, _: m._append([m._stack.pop()]),
    "APPENDS": lambda m, _: m._append(m._since_mark()),
    "SETITEM": lambda m, _: m._set([m._stack.pop(-2), m._stack.pop()]),
    "SETITEMS": lambda m, _: m._set(m._since_mark()),
    "GLOBAL": lambda m, argument: m._global(argument),
    "STACK_GLOBAL": lambda m, argument: m._global(None),
    "REDUCE": lambda m, _: m._call(_FUNCTIONS),
    "NEWOBJ": lambda m, _: m._call(_CLASSES),
    "BUILD": lambda m, _: m._build(),
}
