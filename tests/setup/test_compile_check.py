"""torch.compile may change the speed of a run, but not its gradients."""

import pytest
import torch
from torch import nn

from train.exits import UsageError
from train.setup.compile_check import check_compiled
from train.tasks.base import Ratio, Task


class Squares(Task):
    def loss(self, model, batch):
        return Ratio(model(batch).square().sum(), len(batch))


def compiled(dropout=0.0, fault=False):
    """A model with a fast replacement for torch's compiled form: the model itself, or a faulty
    one."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(dropout), nn.Linear(4, 2))

    def forward(x):
        hidden = model[0](x)
        return model[2](model[1](hidden.detach() if fault else hidden))

    model._compiled_call_impl = forward
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_correct_compiled_form_passes_and_the_model_is_unchanged(dropout):
    model = compiled(dropout)
    form = model._compiled_call_impl
    check_compiled(Squares(None), model, torch.randn(5, 3), "fp32")
    assert model._compiled_call_impl is form
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_wrong_gradient_is_refused(dropout):
    """The compiled form detaches a layer, which then has no gradient."""
    with pytest.raises(UsageError, match=r"a different gradient of 0\.weight.*set compile=false"):
        check_compiled(Squares(None), compiled(dropout, fault=True), torch.randn(5, 3), "fp32")


@pytest.mark.normal
def test_the_real_compiler_passes_on_a_linear_model():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model.compile()
    check_compiled(Squares(None), model, torch.randn(5, 3), "fp32")


def test_running_statistics_are_not_changed():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model._compiled_call_impl = model.forward
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    check_compiled(Squares(None), model, torch.randn(5, 3), "fp32")
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
