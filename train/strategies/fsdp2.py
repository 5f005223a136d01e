"""Parameters, gradients and optimiser state sharded over the ranks (torch's ``fully_shard``).

``fully_shard`` is called directly: Accelerate refuses FSDP without a GPU, and its wrapper adds
nothing that is needed here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from train.exits import UsageError, first_line
from train.optim.probe import Example, Updates, check_sharded
from train.strategies.base import BuildOptimizer
from train.strategies.model_call import ModelCall
from train.strategies.parameters import make_contiguous
from train.strategies.torch_native import TorchStrategy

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
_COMPUTE = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Fsdp2Strategy(TorchStrategy):
    """Each rank holds an equal shard of every parameter, as a DTensor."""

    section: ClassVar[str] = "fsdp2"
    shards_parameters: ClassVar[bool] = True

    def prepare(self, model: nn.Module, build_optimizer: BuildOptimizer) -> None:
        """Shards the blocks, then the rest of the model, in place. Raises UsageError where
        ``fsdp2.replicas`` does not divide the world size."""
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        options, engine, initial = self.options, self.engine, self.setup.initial
        compute = _COMPUTE[self.setup.precision] if options.gather_precision else None
        arguments: dict[str, Any] = {
            "mesh": self._mesh,
            "reshard_after_forward": options.reshard_after_forward,
            "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
        }
        if options.cpu_offload:
            arguments["offload_policy"] = CPUOffloadPolicy(pin_memory=engine.device.type == "cuda")
        model = engine.on_device(model, move=initial is None)
        make_contiguous(model)
        self._hooks = {n: _gradient_hooks(p) for n, p in model.named_parameters() if p.dim()}
        self._scalars = [p for p in model.parameters() if not p.dim()]
        arguments["ignored_params"] = set(self._scalars)
        for block in _without_shared(self.setup.blocks, model):
            fully_shard(block, **arguments)
        self.bare_model = model
        # The rest is gathered for the whole loss: a task may call any method of the model.
        self.wrapped = self.model_call = ModelCall(model, engine.autocast)
        fully_shard(self.wrapped, **arguments)
        self.wrapped.set_reduce_scatter_unused_params(True)  # type: ignore[operator]
        if initial:
            # Only shards are offloaded: forward needs buffers and scalars on the device.
            host = torch.device("cpu")
            initial.fill(model, engine.device, host if options.cpu_offload else engine.device)
        self._build(build_optimizer)
        self._watch_gradients()

    @cached_property
    def _mesh(self) -> DeviceMesh:
        """The ranks, with ``fsdp2.replicas`` in two dimensions. Raises UsageError where these do
        not divide the world size."""
        from torch.distributed.device_mesh import init_device_mesh

        ranks, replicas = self.engine.world_size, self.options.replicas
        if ranks % replicas:
            raise UsageError(
                f"fsdp2.replicas is {replicas}, which does not divide the {ranks} ranks; use one "
                f"of {', '.join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)}."
            )
        self.replicas = replicas
        shape: tuple[int, ...] = (ranks,)
        names: tuple[str, ...] = ("shard",)
        if replicas > 1:
            shape, names = (replicas, ranks // replicas), ("replicate", "shard")
        return init_device_mesh(self.engine.device.type, shape, mesh_dim_names=names)

    def try_sharded(
        self, build_optimizer: BuildOptimizer, example: Example, whole: Updates
    ) -> str | None:
        """Each rank has some rows of each parameter."""
        return check_sharded(build_optimizer, example, whole, self._mesh)

    def call(self, function: Callable[[nn.Module], T]) -> T:
        """Raises UsageError where the function uses a block without calling it."""
        with _uncalled_blocks():
            return super().call(function)

    def call_for_backward(self, function: Callable[[nn.Module], T]) -> T:
        """As ``call``."""
        with _uncalled_blocks():
            return super().call_for_backward(function)

    def _watch_gradients(self) -> None:
        """Records in ``_used`` which parameters get a gradient on this rank. Those that the model
        was built with get none: the gathered ones do, which modules have in forward passes."""
        self._used: set[str] = set()
        self._watched: dict[str, Tensor] = {}
        groups: dict[nn.Module, dict[str, tuple[nn.Module, str]]] = {}
        shards = {id(parameter): name for name, parameter in self._trainable.items()}

        def assign(module: nn.Module, group: nn.Module) -> None:
            group = module if isinstance(module, FSDPModule) else group
            for key, parameter in module._parameters.items():
                if id(parameter) in shards:
                    groups.setdefault(group, {})[shards[id(parameter)]] = (module, key)
            for child in module.children():
                assign(child, group)

        assign(self.wrapped, self.wrapped)
        for group, places in groups.items():
            group.register_forward_pre_hook(partial(self._watch_gathered, places))

    def gathering_modules(self) -> dict[str, nn.Module]:
        """The blocks."""
        named = self.bare_model.named_modules()
        return {
            name: m for name, m in named if isinstance(m, FSDPModule) and isinstance(m, nn.Module)
        }

    def _watch_gathered(
        self, places: Mapping[str, tuple[nn.Module, str]], _module: nn.Module, _inputs: Any
    ) -> None:
        for name, (module, key) in places.items():
            parameter = module._parameters[key]
            if parameter is not self._watched.get(name) and parameter is not None:
                self._watched[name] = parameter
                register: Any = parameter.register_post_accumulate_grad_hook
                register(partial(self._record, name))
                add_hook: Any = parameter.register_hook
                for hook in self._hooks.get(name, ()):
                    add_hook(hook)

    def _record(self, name: str, _parameter: Tensor) -> None:
        self._used.add(name)

    def _unused(self) -> Iterable[str]:
        return self._trainable.keys() - self._used

    def zero_grad(self) -> None:
        """Sets all gradients to None."""
        super().zero_grad()
        self._used.clear()
        self.call_record.clear()

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Reduces gradients at the last micro-batch only; until then each rank holds unsharded
        gradients."""
        self.wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
        self.wrapped.set_is_last_backward(last)  # type: ignore[operator]
        yield

    def _backward(self, loss: Tensor) -> None:
        self.check_calls()
        super()._backward(loss)

    def _update(self, loss_sum: Tensor, clip_norm: float | None) -> tuple[Tensor, Tensor]:
        self._average_scalar_gradients()
        return super()._update(loss_sum, clip_norm)

    def _average_scalar_gradients(self) -> None:
        """``fully_shard`` takes no parameter without dimensions: each rank holds it in full."""
        trained = [parameter for parameter in self._scalars if parameter.requires_grad]
        if not trained:
            return
        zero = torch.zeros((), device=self.engine.device)
        values = [zero if p.grad is None else p.grad.to(zero) for p in trained]
        averages = self.collectives.all_reduce(torch.stack(values)) / self.engine.world_size
        for parameter, average in zip(trained, averages, strict=True):
            parameter.grad = average.to(parameter)

    def undo_forward(self) -> None:
        """Also frees the parameters that the forward pass has gathered."""
        super().undo_forward()
        for module in self.wrapped.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _gradient_hooks(parameter: Tensor) -> list[Callable[[Tensor], Tensor | None]]:
    """What ``register_hook`` was called with, to mask a gradient for example. ``fully_shard``
    replaces the parameter, and with it these."""
    return list((parameter._backward_hooks or {}).values())


@contextmanager
def _uncalled_blocks() -> Iterator[None]:
    """Turns the error for shards among tensors into UsageError."""
    try:
        yield
    except RuntimeError as error:
        if "mixed torch.Tensor and DTensor" not in str(error):
            raise
        raise UsageError(
            "The task uses a parameter of a block, which fsdp2 gathers only while the block itself "
            f"is called ({first_line(error)}); return other blocks in the task's blocks(), such as "
            "[model], or use strategy=ddp."
        ) from error


def _without_shared(blocks: list[nn.Module], model: nn.Module) -> list[nn.Module]:
    """The blocks whose parameters no module outside of them uses. The others stay in the model's
    own group: ``fully_shard`` on them would silently untie the shared parameters."""
    uses: Counter[int] = Counter()
    for module in model.modules():
        uses.update(id(p) for p in module._parameters.values() if p is not None)

    def alone(block: nn.Module) -> bool:
        inside = Counter(
            id(p) for m in block.modules() for p in m._parameters.values() if p is not None
        )
        return all(uses[key] == times for key, times in inside.items())

    return [block for block in blocks if alone(block)]
