"""The modes (training or evaluation) of a model's modules.

A frozen part of a model that ``build_model`` puts into evaluation mode, so that its running
statistics stay and its dropout is off, must stay in it: ``model.train()`` would switch all modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def start_training(model: nn.Module) -> list[str]:
    """Puts a model that its task has built into training mode. Modules in evaluation mode stay in
    it, and their names are returned, without those inside them; but a model that is in evaluation
    mode as a whole, as ``from_pretrained`` of Transformers returns it, is trained as a whole."""
    if not model.training:
        model.train()
    in_evaluation: list[str] = []
    for name, module in model.named_modules():
        outer = name.rpartition(".")[0]
        inside = outer and not model.get_submodule(outer).training
        if not module.training and not inside:
            in_evaluation.append(name)
    return in_evaluation


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts all modules into evaluation mode, and afterwards each back into its mode before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in modes:
        module.training = False  # DeepSpeed's engine forwards eval() to the module inside only
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
