"""torch.compile may change the speed of a run, but not its gradients."""

import pytest
import torch
from torch import nn

from tests.support.ranks import on_ranks
from train.distributed.collectives import Collectives
from train.exits import UsageError
from train.setup.compile_check import check_compiled
from train.tasks.base import Ratio, Task

ALONE = Collectives(rank=0, world_size=1)


class Squares(Task):
    def loss(self, model, batch):
        return Ratio(model(batch).square().sum(), len(batch))


class Model(nn.Module):
    """Not a bare nn.Sequential, which torch.compile does not compile."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, batch):
        return self.layers(batch)


def detach_first_layer(module, inputs):
    """A backend of torch.compile with a fault: the first layer gets no gradient."""
    first = next(node for node in module.graph.nodes if "linear" in str(node.target).lower())
    with module.graph.inserting_after(first):
        detached = module.graph.call_method("detach", (first,))
    first.replace_all_uses_with(detached, delete_user_cb=lambda user: user is not detached)
    module.recompile()
    return module.forward


def compiled(dropout=0.0, backend="eager"):
    model = Model(nn.Linear(3, 4), nn.Dropout(dropout), nn.Linear(4, 2))
    model.compile(backend=backend)
    return model


def check_model(model, collectives=ALONE):
    batch = torch.randn(5, 3)
    check_compiled(Squares(None), lambda loss: loss(model), model, batch, "fp32", collectives)


@pytest.mark.normal
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_correct_gradients_pass_and_leave_the_model_unchanged(dropout):
    calls = []

    def counted(module, inputs):
        return lambda *arguments: calls.append(1) or module(*arguments)

    model = compiled(dropout, backend=counted)
    check_model(model)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    calls.clear()
    model(torch.randn(5, 3))
    assert calls  # still compiled


@pytest.mark.normal
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_silently_wrong_gradient_is_refused(dropout):
    """A detached layer has no gradient at all in the compiled form."""
    with pytest.raises(
        UsageError, match=r"a different gradient of layers\.0\.weight.*set compile=false"
    ):
        check_model(compiled(dropout, detach_first_layer))


@pytest.mark.slow
def test_the_real_compiler_agrees_on_a_linear_model():
    model = Model(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model.compile()
    check_model(model)


@pytest.mark.normal
def test_running_statistics_are_unchanged():
    model = Model(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model.compile(backend="eager")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    check_model(model)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


class Changing(nn.Module):
    """Another output in each pass of training, as with dropout, but without the generator, which
    the threads would share."""

    passes = 0

    def forward(self, batch):
        self.passes += self.training
        return batch * self.passes if self.training else batch


def test_a_fault_on_one_rank_is_refused_on_all():
    """The ranks also agree on evaluation mode, though only rank 1 sees gradients that differ."""
    modes = []

    def check(collectives):
        faulty = collectives.rank == 0
        model = Model(nn.Linear(3, 4), nn.Identity() if faulty else Changing(), nn.Linear(4, 2))
        model.register_forward_hook(lambda *_: modes.append((collectives.rank, model.training)))
        if faulty:
            model._compiled_call_impl = lambda batch: model.layers(batch.detach() * 2)
        check_model(model, collectives)

    errors = on_ranks(2, check)
    assert [type(error) for error in errors] == [UsageError, UsageError]
    assert str(errors[0]) == str(errors[1])
    # Rank 0 does not count its compiled pass here.
    assert modes.count((0, False)) == 1
    assert modes.count((1, False)) == 2
