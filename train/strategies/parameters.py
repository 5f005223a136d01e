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
            if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                continue
            if module.sparse:
                raise _sparse(name)
            if module.max_norm is not None:
                raise UsageError(
                    f"{where} has max_norm, so its forward pass changes its weight, which replicas "
                    "do not exchange and sharded strategies lose; remove max_norm, and limit the "
                    "norms of what it returns."
                )


def check_modules(model: nn.Module, *, allocated: bool) -> None:
    """Raises UsageError for modules that a strategy cannot wrap, for tensors without values if the
    model is ``allocated``, and where nothing trains."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UsageError(
                f"{name or 'The model'} is a TorchScript module, of which no strategy can replace "
                "or watch parameters; use the module that it was scripted from, and compile=true "
                "for speed."
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if allocated and tensor.is_meta:
            raise UsageError(
                f"build_model() returns a model in which {name} is on the meta device, without "
                "values; give it values, or implement init_module() for all of the model."
            )
    # One without elements has nothing to train.
    if not any(p.requires_grad and p.numel() for p in model.parameters()):
        raise UsageError(
            "The model has no trainable parameter; set requires_grad=True on at least one."
        )


def check_memory(model: nn.Module) -> None:
    """Raises UsageError for trainable parameters that share memory with themselves, with another
    parameter or with a buffer: the optimiser would change what it has changed already, or what it
    does not train, and shards would have memory of their own."""
    by_storage: dict[tuple[torch.device, int], list[tuple[str, Tensor]]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.layout == torch.strided and not tensor.is_meta and tensor.numel():
            key = tensor.device, tensor.untyped_storage().data_ptr()
            by_storage.setdefault(key, []).append((name, tensor))
    for tensors in by_storage.values():
        for name, tensor in tensors:
            if not tensor.requires_grad:
                continue
            if any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
                raise UsageError(
                    f"The elements of the parameter {name} share memory, as after expand(); give "
                    "each its own with clone() or contiguous(), or expand it in forward()."
                )
            for other, shared in tensors:
                if other != name and _overlap(tensor, shared):
                    raise UsageError(
                        f"The parameter {name} shares memory with {other}, but is another tensor, "
                        "so that shards of them would not; use one nn.Parameter in both places, "
                        "transposed in forward() if need be, or give each its own memory with "
                        "clone()."
                    )


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage have a byte in common."""
    (a, b), (c, d) = _extent(one), _extent(other)
    if b <= c or d <= a:
        return False
    if one.dtype != other.dtype:
        return True
    used = torch.zeros(max(b, d) // one.element_size(), dtype=torch.bool)
    used.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(used.as_strided(other.shape, other.stride(), other.storage_offset()).any())


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its storage, and the one after its last."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start, size = int(tensor.storage_offset()), tensor.element_size()
    return start * size, int(start + last + 1) * size


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
