"""Optimisers as people write them."""

import torch
from torch.optim import Optimizer


class Sign(Optimizer):
    """Element by element, with an average as its state (Lion)."""

    def __init__(self, params, lr=1e-3, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.clock = 0

    def state_of(self, parameter):
        state = self.state[parameter]
        if not state:
            state["average"] = torch.zeros_like(parameter)
        return state

    def direction(self, parameter):
        average = self.state_of(parameter)["average"]
        average.lerp_(parameter.grad, 0.1)
        return average.sign()

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(self.direction(parameter), alpha=-group["lr"])


class Trust(Sign):
    """Scales each parameter's update by its norm (LARS, LAMB)."""

    def direction(self, parameter):
        step = super().direction(parameter)
        return step * (parameter.norm() / step.norm().clamp(min=1e-6))


class Listing(Sign):
    """Keeps a list of tensors."""

    def direction(self, parameter):
        self.state_of(parameter).setdefault("all", []).append(parameter.grad.clone())
        return super().direction(parameter)


class Global(Sign):
    """Keeps state that belongs to no parameter."""

    def direction(self, parameter):
        self.state["global"]["steps"] = self.state["global"].get("steps", 0) + 1
        return super().direction(parameter)


class Clock(Sign):
    """Counts in an attribute."""

    def direction(self, parameter):
        self.clock += 1
        return super().direction(parameter) * (1 + 1 / self.clock)


class Grouped(Sign):
    """Keeps a tensor in its parameter groups."""

    def step(self):
        for group in self.param_groups:
            group["distance"] = group.get("distance", torch.zeros(())) + 1
        super().step()


class Rows(Sign):
    """Keeps a number per row."""

    def direction(self, parameter):
        state = self.state_of(parameter)
        state["rows"] = parameter.grad.flatten(1).norm(dim=1) if parameter.dim() > 1 else 0.0
        return super().direction(parameter)


class Picky(Sign):
    """Takes matrices with an even number of rows only."""

    def direction(self, parameter):
        if len(parameter) % 2:
            raise ValueError("odd")
        return super().direction(parameter)
