"""What forward passes do to a model besides computing: they may register parts that a new model
lacks, change parameters, which only the optimiser may do, switch modes, and change buffers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from train.distributed.collectives import Collectives
from train.distributed.torch_settings import TorchSettings
from train.exits import UsageError
from train.loop.hidden_state import TensorState
from train.setup.micro_batch_effects import known_kind
from train.strategies.base import Strategy
from train.strategies.call_order import same_calls
from train.suggest import listed

_WATCHED_CALLS = 16  # of a module: a report may call it once for each token that it generates
_SUMMED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class RegisteredParts:
    """The names of a model's parameters and persistent buffers when this is made."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = _registered(model)

    def check(self, since: str) -> None:
        """Raises UsageError for a part that ``since``, such as "first step", has registered."""
        for name, kind in _registered(self._model).items():
            if name not in self._before:
                later = ", as None if it has no value yet" if kind == "buffer" else ""
                raise UsageError(
                    f"The {since} registered the {kind} {name}, which a model that is built to "
                    f"train or to resume lacks; register it in the module's constructor{later}."
                )


def _registered(model: nn.Module) -> dict[str, str]:
    """By name, "parameter" or "buffer"; also of those that are None."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        found |= {f"{prefix}{name}": "parameter" for name in module._parameters}
        persistent = module._buffers.keys() - module._non_persistent_buffers_set
        found |= {f"{prefix}{name}": "buffer" for name in persistent}
    return found


class _Value(NamedTuple):
    """A parameter at one time; a few numbers stand for its values."""

    parameter: Tensor
    size: int
    """Elements here; 0 where DeepSpeed has released or is still gathering the parameter."""
    version: int | None
    """The number of its in-place changes, where there are no numbers."""
    numbers: Tensor | None


class ParameterChanges:
    """The parameters that forward passes have changed or replaced.

    On one process such a change stays; replicas do not exchange it, and shards lose it, since a
    module gets gathered copies.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places = [
            (f"{path}.{key}" if path else key, module, key)
            for path, module in model.named_modules()
            for key in module._parameters
        ]
        self._changed: dict[str, None] = {}

    @contextmanager
    def watching(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Compares the parameters before and after the first calls of ``modules``: of the one
        around the model, and of those inside it that gather parameters, while they are gathered."""
        with ExitStack() as stack:
            for module in modules:
                self._watch(stack, module)
            yield

    def _watch(self, stack: ExitStack, outer: nn.Module) -> None:
        inside = set(outer.modules())
        places = [place for place in self._places if place[1] in inside]
        started: list[dict[str, _Value]] = []
        calls = itertools.count()

        def before(*_: Any) -> None:
            started.append(_values(places) if next(calls) < _WATCHED_CALLS else {})

        def after(*_: Any) -> None:
            earlier = started.pop()
            now = _values(places) if earlier else {}
            for name, value in earlier.items():
                if name not in now or _differs(value, now[name]):
                    self._changed[name] = None

        # After it has gathered, and before it releases.
        stack.callback(outer.register_forward_pre_hook(before).remove)
        stack.callback(outer.register_forward_hook(after, prepend=True).remove)

    def check(self, collectives: Collectives) -> None:
        """Raises UsageError on all ranks where a parameter has changed on any; collective."""
        for changed in collectives.all_gather_object(list(self._changed)):
            if changed:
                raise UsageError(
                    f"The forward pass changed the values of the parameters {listed(changed, 3)}, "
                    "which replicas do not exchange and sharded strategies lose; compute from a "
                    "changed copy instead, and keep what the optimiser does not train, such as a "
                    "moving average of weights, in buffers."
                )


def _values(places: Iterable[tuple[str, nn.Module, str]]) -> dict[str, _Value]:
    found = {name: module._parameters.get(key) for name, module, key in places}
    return {name: _value(p) for name, p in found.items() if p is not None}


def _value(parameter: Tensor) -> _Value:
    # With zero3; it gathers before the module that needs them asks.
    status = getattr(parameter, "ds_status", None)
    if status is not None and status.name != "AVAILABLE":
        return _Value(parameter, 0, None, None)
    if isinstance(parameter, DTensor) or parameter.dtype not in _SUMMED:
        return _Value(parameter, parameter.numel(), parameter._version, None)
    data = parameter.detach()
    # A sum may need a copy in its own dtype, for which there may be no memory.
    small = data.numel() < 2**24 and data.device.type in ("cpu", "cuda")
    wide = torch.float64 if small else torch.float32
    norm, total = torch.linalg.vector_norm(data, dtype=wide), data.sum(dtype=wide)
    return _Value(parameter, data.numel(), None, torch.stack([norm, total]))


def _differs(one: _Value, other: _Value) -> bool:
    if one.parameter is not other.parameter:
        # A module that gathers exchanges them itself.
        return not isinstance(one.parameter, DTensor) and not isinstance(other.parameter, DTensor)
    if one.size != other.size or not one.size:
        return False
    if one.numbers is None or other.numbers is None:
        return one.version != other.version
    return not torch.equal(one.numbers.nan_to_num(), other.numbers.nan_to_num())


class ModeChanges:
    """The modules that forward passes have left in another mode (training or evaluation).

    Such a mode holds from the next micro-batch to the next start of the run, so that the result
    would depend on both.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.named_modules())
        self._changed: dict[str, str] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Surrounds a forward pass."""
        before = [module.training for _, module in self._modules]
        yield
        for (name, module), training in zip(self._modules, before, strict=True):
            if module.training != training:
                self._changed[name] = "training" if module.training else "evaluation"

    def check(self, collectives: Collectives) -> None:
        """Raises UsageError on all ranks where a mode has changed on any; collective."""
        for changed in collectives.all_gather_object(self._changed):
            if changed:
                names = listed([name or "(the model itself)" for name in changed], 3)
                mode = next(iter(changed.values()))
                raise UsageError(
                    f"The forward pass left {names} in {mode} mode, which would hold until the "
                    "next start of the run; call eval() in build_model() for the modules that stay "
                    "in evaluation mode, or restore the mode before loss() or measure() returns."
                )


class RefusedEffects:
    """What no forward pass may do, on any placement: change parameters, leave modules in another
    mode or settings of torch changed, register parts, or call modules that gather parameters in
    another order than other ranks. ``compiled``: the calls of modules inside are not watched."""

    def __init__(self, strategy: Strategy, *, compiled: bool) -> None:
        model = strategy.bare_model
        self._strategy, self._gathering = strategy, strategy.gathering_modules()
        self._watched = [strategy.model_call, *([] if compiled else self._gathering.values())]
        self._registered = RegisteredParts(model)
        self._parameters, self._modes = ParameterChanges(model), ModeChanges(model)
        self._settings = TorchSettings()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Surrounds a forward pass; collective."""
        with (
            same_calls(self._gathering, self._strategy.collectives),
            self._modes.watching(),
            self._parameters.watching(self._watched),
        ):
            try:
                yield
            except Exception:  # DeepSpeed does not know a new parameter, and fails
                self._registered.check("forward pass")
                raise

    def check(self, since: str) -> None:
        """Raises UsageError on all ranks for what was done; ``since``: see RegisteredParts."""
        self._registered.check(since)
        self._parameters.check(self._strategy.collectives)
        self._modes.check(self._strategy.collectives)
        for changed in self._strategy.collectives.all_gather_object(self._settings.changed()):
            if changed:
                raise UsageError(
                    f"The {since} changed a setting of torch ({', '.join(changed)}), which would "
                    "hold until the end of the process; set it in build_model(), or restore it "
                    "before the method of the task returns."
                )


class BufferChanges:
    """The persistent buffers that forward passes have changed: those of rank 0 count, so that the
    result depends on its micro-batches. Leaves out the modules that the start of a run names."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._changed: dict[str, None] = {}

    @property
    def names(self) -> list[str]:
        """Their names."""
        return list(self._changed)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Surrounds a forward pass."""
        before = {name: TensorState(tensor) for name, tensor in self._buffers()}
        yield
        for name, tensor in self._buffers():
            if name not in before or not before[name].same(TensorState(tensor)):
                self._changed[name] = None

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        for path, module in self._model.named_modules():
            if known_kind(module):
                continue
            for name, tensor in module._buffers.items():
                if tensor is not None and name not in module._non_persistent_buffers_set:
                    yield f"{path}.{name}" if path else name, tensor
