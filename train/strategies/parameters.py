"""Parameters that the sharding libraries do not take as they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from train.exits import UsageError
from train.strategies.unused import autograd_nodes


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def check_parameters(model: nn.Module) -> None:
    """Raises UsageError for parameters without a shape, and for trainable ones whose gradients the
    sharding libraries cannot exchange."""
    for prefix, module in model.named_modules():
        where = f"{prefix or 'the model'} ({type(module).__name__})"
        own = {**module._parameters, **module._buffers}
        if any(is_lazy(tensor) for tensor in own.values() if tensor is not None):
            raise UsageError(
                f"build_model() returns a model in which the lazy module {where} has no shape yet; "
                "give its sizes, or call the model once on an example at the end of build_model()."
            )
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            name = f"{prefix}.{key}" if prefix else key
            if parameter.is_complex():
                raise UsageError(
                    f"The trainable parameter {name} is complex ({parameter.dtype}), which sharded "
                    "strategies cannot train; let the parameter be torch.view_as_real() of it, and "
                    "use torch.view_as_complex() of that in forward()."
                )
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
                raise _sparse(name)


def check_dense(loss: Tensor) -> None:
    """Raises UsageError where the backward pass of ``loss`` gives a sparse gradient."""
    for node in autograd_nodes(loss):
        if getattr(node, "_saved_sparse", False) or getattr(node, "_saved_sparse_grad", False):
            reached = (getattr(following, "variable", None) for following, _ in node.next_functions)
            shapes = [tuple(variable.shape) for variable in reached if variable is not None]
            raise _sparse(f"a parameter of the shape {shapes[0]}" if shapes else "a parameter")


def _sparse(what: str) -> UsageError:
    return UsageError(
        f"The gradient of {what} is sparse, which sharded strategies cannot exchange; set "
        "sparse=False (or sparse_grad=False) where the parameter is used."
    )


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
