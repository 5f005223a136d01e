"""Parameters that the sharding libraries do not take as they are."""

from __future__ import annotations

import torch
from torch import nn


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


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


def to_fp32(model: nn.Module, precision: str) -> list[str]:
    """Converts trainable parameters to fp32, in which every strategy trains, and with them the
    tensors of the same dtype in their modules. Returns the names of what was converted.

    Frozen parameters in half precision keep it where the forward pass runs under autocast
    (``precision`` is not fp32): there they save memory, and operations take mixed dtypes.
    """
    converted = []
    for prefix, module in model.named_modules():
        own = {**module._parameters, **module._buffers}
        tensors = {name: tensor for name, tensor in own.items() if tensor is not None}
        wrong = {t.dtype for t in tensors.values() if t.requires_grad and t.is_floating_point()}
        wrong -= {torch.float32}
        for name, tensor in tensors.items():
            half = tensor.dtype in (torch.bfloat16, torch.float16)
            frozen = half and precision == "fp32" and isinstance(tensor, nn.Parameter)
            if tensor.dtype in wrong or frozen:
                tensor.data = tensor.data.float()
                converted.append(f"{prefix}.{name}" if prefix else name)
    return converted
