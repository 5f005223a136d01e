"""Buffers to which a forward pass has assigned tensors of another shape or dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

_HALF = (torch.bfloat16, torch.float16)


def adopt_buffers(
    model: nn.Module,
    stored: Mapping[str, tuple[torch.Size, torch.dtype]],
    *,
    prefix: str = "",
) -> None:
    """Gives the persistent buffers of a new model the shapes and dtypes of stored ones, without
    values.

    ``stored`` has the names of a state_dict after ``prefix``. Also a buffer that is None in the new
    model is allocated. Other buffers keep their tensors.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for path, module in model.named_modules():
        for name, tensor in module._buffers.items():
            full = f"{prefix}{path}.{name}" if path else prefix + name
            if full not in stored or name in module._non_persistent_buffers_set:
                continue
            shape, dtype = stored[full]
            if tensor is not None and dtype in _HALF and tensor.is_floating_point():
                dtype = tensor.dtype  # a run of an earlier version trained in half precision
            if tensor is None or tensor.shape != shape or tensor.dtype != dtype:
                where = device if tensor is None else tensor.device
                module._buffers[name] = torch.empty(shape, dtype=dtype, device=where)
