"""Parameters that the sharding libraries do not take as they are."""

from __future__ import annotations

from torch import nn


def empty_to_buffers(model: nn.Module) -> None:
    """Makes buffers of the parameters without elements: there is nothing to train, and neither
    FSDP2 nor DeepSpeed takes them. Their names stay the same."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not parameter.numel():
                del module._parameters[name]
                module.register_buffer(name, parameter.detach())


def make_contiguous(model: nn.Module) -> None:
    """Stores each parameter in row-major order, in which ranges of elements are sharded. The values
    stay the same."""
    for parameter in model.parameters():
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
