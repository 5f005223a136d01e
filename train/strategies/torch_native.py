"""The part that a single process, DDP and FSDP2 share: autograd and torch's own optimiser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from train.checkpoint.state import OptimizerState
from train.distributed.shard import Shard, model_tensors, parameter_names
from train.exits import UsageError
from train.optim.optimizer import skips_on_device
from train.strategies.base import BuildOptimizer, Strategy
from train.strategies.parameters import trainable_parameters
from train.strategies.unused import unused_everywhere


class TorchStrategy(Strategy):
    """Parameters are plain tensors or DTensors, which the optimiser updates directly."""

    def _build(self, build_optimizer: BuildOptimizer) -> None:
        """Builds the optimiser, once the model has its final parameters."""
        self.optimizer = build_optimizer(self.bare_model)
        self._trainable = trainable_parameters(self.bare_model)
        self._parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        self.skips_on_device = flag_is_beside(self._parameters, self.engine.device) and (
            skips_on_device(self.optimizer)
        )

    def zero_grad(self) -> None:
        """Sets all gradients to None."""
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def _update(self, loss_sum: Tensor, clip_norm: float | None) -> tuple[Tensor, Tensor]:
        self._leave_out_unused()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        shards = [g.to_local() for g in gradients if isinstance(g, DTensor)]
        full = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        norm, divisor = self.norm_and_divisor(
            shards, clip_norm, sharded=self.shards_parameters, replicated=full
        )
        if clip_norm is not None or self.loss_scale:
            factor = divisor.reciprocal()
            for same in _by_kind(shards + full):
                torch._foreach_mul_(same, factor.to(same[0]))
        norm = norm.float()
        skipped = self.skip(loss_sum, norm)
        if self.skips_on_device:
            flag = self._beside_parameters(skipped)
            self.optimizer.grad_scale, self.optimizer.found_inf = None, flag  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not skipped.item():
            self.optimizer.step()
        return norm, skipped

    def _leave_out_unused(self) -> None:
        """Removes gradients that no micro-batch of the step has computed on any rank."""
        if self.engine.world_size > 1:
            for name in unused_everywhere(self.collectives, self._unused()):
                self._trainable[name].grad = None

    def _unused(self) -> Iterable[str]:
        """The names of the parameters that got no gradient on this rank in this step."""
        return [name for name, p in self._trainable.items() if p.grad is None]

    def check_unused(self) -> None:
        """Raises UsageError on all ranks where no trainable parameter got a gradient on any;
        collective."""
        if len(unused_everywhere(self.collectives, self._unused())) == len(self._trainable):
            raise UsageError(
                "The loss of the first step uses no trainable parameter, so nothing would be "
                "trained; compute it from the model that loss() gets."
            )

    def _beside_parameters(self, scalar: Tensor) -> Tensor:
        """A scalar in the form that operations with the parameters take: a DTensor for DTensors."""
        like = self._parameters[0]
        if not isinstance(like, DTensor):
            return scalar
        mesh = like.device_mesh
        return DTensor.from_local(scalar, mesh, [Replicate()] * mesh.ndim, run_check=False)

    def tensors(self) -> dict[str, Shard]:
        """This rank's shards of the bare model's tensors."""
        return {name: Shard.of(t) for name, t in model_tensors(self.bare_model).items()}

    def weights(self) -> dict[str, Shard]:
        """This rank's shards of the parameters; they share the parameters' memory."""
        return {
            name: Shard.of(parameter)
            for name, parameter in self.bare_model.named_parameters()
            if parameter.requires_grad
        }

    def sync_weights(self) -> None:
        """Nothing to do: the shards share memory with the model."""

    def optimizer_state(self) -> OptimizerState:
        """The entries of the torch optimiser's ``state``."""
        names = parameter_names(self.bare_model)
        return {
            names[id(parameter)]: {
                key: Shard.of(value) if isinstance(value, Tensor) else value
                for key, value in self.optimizer.state.get(parameter, {}).items()
            }
            for parameter in self._parameters
        }

    def make_optimizer_state(self, stored: Mapping[str, Mapping[str, Any]]) -> OptimizerState:
        """State with the shape of its parameter is sharded like it; other state is full on every
        rank."""
        names = parameter_names(self.bare_model)
        self._state = {
            index: {
                key: _empty(parameter, *value) if isinstance(value, tuple) else value
                for key, value in stored[names[id(parameter)]].items()
            }
            for index, parameter in enumerate(self._parameters)
            if stored.get(names[id(parameter)])
        }
        return {
            names[id(self._parameters[index])]: {
                key: Shard.of(value) if isinstance(value, Tensor) else value
                for key, value in entries.items()
            }
            for index, entries in self._state.items()
        }

    def adopt_optimizer_state(self, state: OptimizerState) -> None:
        """Loads the state through the optimiser's ``load_state_dict``."""
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": self._state, "param_groups": groups})
        del self._state

    def gradients(self) -> dict[str, Shard]:
        """The gradients, after clipping."""
        return {
            name: Shard.of(parameter.grad)
            for name, parameter in self.bare_model.named_parameters()
            if parameter.grad is not None
        }


def flag_is_beside(parameters: Sequence[Tensor], device: torch.device) -> bool:
    """Whether a flag on ``device`` can tell the optimiser to skip a step.

    Where parameters are on the CPU (``fsdp2.cpu_offload``), torch's fused optimisers copy the flag
    there without waiting for it, and would read it before it has its value. On the CPU, reading the
    flag is cheaper: there is no device to wait for. And the flag has one form, that of the first
    parameter.
    """
    on_device = device.type != "cpu" and all(p.device.type == device.type for p in parameters)
    return on_device and len({isinstance(p, DTensor) for p in parameters}) == 1


def _by_kind(tensors: list[Tensor]) -> Iterable[list[Tensor]]:
    """The tensors in groups with the same device and dtype."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return found.values()


def _empty(parameter: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Memory for an entry of the state: like the parameter, or a full tensor on the host."""
    if shape == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype)
