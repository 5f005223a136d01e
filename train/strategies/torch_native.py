"""What single process, DDP and FSDP2 share: parameters with gradients, and torch's optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from train.checkpoint.state import OptimizerState
from train.distributed.shard import Shard, model_tensors, parameter_names
from train.optim.optimizer import skips_on_device
from train.strategies.base import Strategy


class TorchStrategy(Strategy):
    """Parameters are whole tensors or DTensors; the optimiser steps on them as they are."""

    def _build(self, build: Callable[[nn.Module], Optimizer]) -> None:
        """The optimiser; after the model has its final parameters."""
        self.optimizer = build(self.bare_model)
        self._parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        # On the CPU there is no device to wait for, and to look costs less.
        on_cpu = self.engine.device.type == "cpu"
        self.skips_on_device = not on_cpu and skips_on_device(self.optimizer)

    def zero_grad(self) -> None:
        """As the optimiser does."""
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Plain autograd."""
        loss.backward()  # type: ignore[no-untyped-call]

    def update(self, loss_sum: Tensor, clip_norm: float | None) -> tuple[Tensor, Tensor]:
        """Norm, clipping and step with torch's own multi-tensor operations."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        spread = any(isinstance(gradient, DTensor) for gradient in gradients)
        if spread:
            gradients = [_local(gradient) for gradient in gradients]
        norm, divisor = self.norm_and_divisor(gradients, clip_norm, spread=spread)
        if clip_norm is not None or self.engine.loss_scale:
            factor = divisor.reciprocal()
            for same in _by_kind(gradients):
                torch._foreach_mul_(same, factor.to(same[0]))
        norm = norm.float()
        skipped = 1.0 - torch.isfinite(norm + loss_sum).float()
        if self.skips_on_device:
            flag = self._beside_parameters(skipped)
            self.optimizer.grad_scale, self.optimizer.found_inf = None, flag  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not skipped.item():
            self.optimizer.step()
        return norm, skipped

    def _beside_parameters(self, scalar: Tensor) -> Tensor:
        """A scalar that may be used in operations with the parameters."""
        like = self._parameters[0]
        if not isinstance(like, DTensor):
            return scalar
        mesh = like.device_mesh
        return DTensor.from_local(scalar, mesh, [Replicate()] * mesh.ndim, run_check=False)

    def tensors(self) -> dict[str, Shard]:
        """Of the bare model."""
        return {name: Shard.of(t) for name, t in model_tensors(self.bare_model).items()}

    def weights(self) -> dict[str, Shard]:
        """The parameters themselves."""
        return {
            name: Shard.of(parameter)
            for name, parameter in self.bare_model.named_parameters()
            if parameter.requires_grad
        }

    def sync_weights(self) -> None:
        """They are the model's own."""

    def optimizer_state(self) -> OptimizerState:
        """As torch's optimiser holds it."""
        names = parameter_names(self.bare_model)
        return {
            names[id(parameter)]: {
                key: Shard.of(value) if isinstance(value, Tensor) else value
                for key, value in self.optimizer.state.get(parameter, {}).items()
            }
            for parameter in self._parameters
        }

    def make_optimizer_state(self, stored: Mapping[str, Mapping[str, Any]]) -> OptimizerState:
        """Tensors like the parameters where shapes agree, else whole ones on every rank."""
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
        """Through the optimiser's own ``load_state_dict``."""
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": self._state, "param_groups": groups})
        del self._state

    def gradients(self) -> dict[str, Shard]:
        """As they are after clipping."""
        return {
            name: Shard.of(parameter.grad)
            for name, parameter in self.bare_model.named_parameters()
            if parameter.grad is not None
        }


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _by_kind(tensors: list[Tensor]) -> Iterable[list[Tensor]]:
    """In groups that lie on one device and have one dtype."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return found.values()


def _empty(parameter: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Memory for a piece of state: like the parameter, or a whole tensor on the host."""
    if shape == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype)
