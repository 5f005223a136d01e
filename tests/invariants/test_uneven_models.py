"""I1 to I3 for models of which a micro-batch uses a part, or another method than ``forward``."""

import json
import re
import shutil

import pytest
import torch
from torch import nn

from tests.invariants.test_odd_models import assert_same_run
from tests.support.forked import run, run_ranks
from tests.support.lanes import thinned
from tests.support.ranks import on_ranks
from tests.support.runs import checkpoints, tensors
from train.exits import UsageError
from train.strategies.call_order import CallRecord, same_calls
from train.strategies.unused import not_reached, unused_everywhere

BASE = [
    "batch.micro_batch_size=3", "length.steps=8", "checkpoint.every_steps=4",
    "checkpoint.keep_last=9", "evaluate.every_steps=4", "optim.weight_decay=0.1",
]  # fmt: skip
EXPERTS = ["task.use=tests.support.uneven:ExpertsTask", *BASE]
ENCODER = ["task.use=tests.support.uneven:EncoderTask", *BASE]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of the experts on one process."""
    directory = tmp_path_factory.mktemp("alone")
    run("fit", directory, *EXPERTS)
    return directory


@pytest.mark.parametrize(
    ("ranks", "options"),
    thinned(
        [
            (2, ["strategy=ddp"]),
            (2, ["strategy=ddp", "ddp.find_unused_parameters=true"]),
            (2, ["strategy=ddp", "ddp.gradient_as_bucket_view=false"]),
            (3, ["strategy=ddp", "batch.micro_batch_size=4"]),
            (2, ["strategy=fsdp2"]),
            (2, ["strategy=fsdp2", "fsdp2.reshard_after_forward=false"]),
            (3, ["strategy=fsdp2", "batch.micro_batch_size=2"]),
        ],
        kept=lambda case: case == (3, ["strategy=fsdp2", "batch.micro_batch_size=2"]),
    ),
)
def test_experts_train_as_on_one_process(alone, tmp_path, ranks, options):
    """Those that no sample of a step has chosen keep their weights and their moments."""
    run_ranks(ranks, "fit", tmp_path, *EXPERTS, *options)
    assert_same_run(alone, tmp_path)
    # Never used, so weight decay does not change it either.
    assert torch.equal(tensors(tmp_path)["model.idle"], torch.ones(3))
    assert "optim.idle.exp_avg" not in tensors(tmp_path)


def test_experts_resume_on_another_placement(alone, tmp_path):
    """The moments of some parameters are in the checkpoint, those of others are not."""
    moved = tmp_path / "moved"
    shutil.copytree(alone, moved)
    (moved / "finished.json").unlink()
    shutil.rmtree(moved / f"checkpoints/step-{checkpoints(moved)[-1]:012d}")
    run_ranks(2, "fit", moved, *EXPERTS, "strategy=ddp")
    attempt = json.loads((moved / "attempts.jsonl").read_text().splitlines()[-1])
    assert attempt["resumed_from_step"] == 4
    assert_same_run(alone, moved)


@pytest.mark.parametrize(
    ("options", "message"),
    thinned(
        [
            (["strategy=zero1"], "got no gradient from a micro-batch on rank"),
            (["strategy=zero2"], "got no gradient from a micro-batch on rank"),
            (["strategy=zero3"], "the parameters of these modules at each call"),
            (["strategy=fsdp2", "model.whole=false"], "the parameters of these modules at each"),
        ],
        kept=lambda case: case[0] in (["strategy=zero2"], ["strategy=fsdp2", "model.whole=false"]),
    ),
)
def test_experts_that_ranks_cannot_exchange_are_refused(tmp_path, options, message):
    for done in run_ranks(2, "fit", tmp_path, *EXPERTS, *options, expect=64):
        assert message in done.stderr
        assert "experts." in done.stderr


@pytest.mark.parametrize(
    "options",
    thinned(
        [["strategy=ddp"], ["strategy=fsdp2"], ["strategy=zero1"], ["strategy=zero3"],
         ["strategy=zero3", "zero.param_persistence_threshold=0"]],
        kept=lambda case: case == ["strategy=zero3", "zero.param_persistence_threshold=0"],
    ),
)  # fmt: skip
@pytest.mark.parametrize("precision", thinned(["fp32", "bf16"], kept=["fp32"]))
def test_methods_other_than_forward_train_alike(tmp_path, options, precision):
    run("fit", tmp_path / "one", *ENCODER, f"precision={precision}")
    run_ranks(2, "fit", tmp_path / "two", *ENCODER, *options, f"precision={precision}")
    if precision == "fp32":
        assert_same_run(tmp_path / "one", tmp_path / "two")
        return
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if name.startswith("model."):
            torch.testing.assert_close(two[name], tensor, rtol=0.05, atol=0.01, msg=name)


def test_all_of_a_loss_is_computed_in_the_precision_of_the_run(tmp_path):
    run("fit", tmp_path / "bf16", *ENCODER, "task.dtype=bfloat16", "precision=bf16")
    run("fit", tmp_path / "fp32", *ENCODER, "task.dtype=float32")


def test_a_parameter_that_is_unfrozen_during_the_run_is_refused(tmp_path):
    done = run("fit", tmp_path, *ENCODER, "task.unfreeze_at=3", expect=64)
    assert "own was frozen when the run started" in done.stderr


def test_a_block_that_is_used_without_a_call_is_refused(tmp_path):
    for done in run_ranks(
        2, "fit", tmp_path, *ENCODER, "task.bypass=true", "strategy=fsdp2", expect=64
    ):
        assert "uses a parameter of a block" in done.stderr


@pytest.mark.slow
def test_a_parameter_that_is_frozen_during_the_run_keeps_its_value(tmp_path):
    options = [*ENCODER, "task.freeze_at=3"]
    run("fit", tmp_path / "one", *options)
    run_ranks(2, "fit", tmp_path / "two", *options, "strategy=ddp")
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert torch.equal(one["model.own"], two["model.own"])
    assert one["optim.own.step"] < one["optim.scale.step"]


# -- the parts --------------------------------------------------------------------------------


class Detour(torch.autograd.Function):
    """Hides what it computes, as a reentrant checkpoint does."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


DROPPING = ["task.use=tests.support.uneven:DroppingTask", "batch.micro_batch_size=6"]


@pytest.mark.parametrize(
    ("options", "when"),
    thinned(
        [
            (["strategy=fsdp2"], "training"),
            (["strategy=fsdp2"], "evaluation"),
        ],
        kept=lambda case: case[1] == "training",
    ),
)
def test_layers_that_ranks_leave_out_later_are_refused(tmp_path, options, when):
    """Each rank gathers as many layers of the same shape, so that nothing fails by itself."""
    steps = ["length.steps=20", "checkpoint.every_steps=2", "evaluate.every_steps=4"]
    found = run_ranks(
        2, "fit", tmp_path, *DROPPING, *steps, *options, f"model.when={when}", expect=64
    )
    assert re.search(r"Rank 0 calls layers\.\d where rank 1 calls layers\.\d", found[0].stderr)
    assert checkpoints(tmp_path)[-1] < 20


@pytest.mark.parametrize("when", thinned(["training", "evaluation"], kept=["training"]))
def test_ranks_that_leave_out_other_numbers_of_layers_are_refused(tmp_path, when):
    """One rank waits within the forward pass that the other has left."""
    found = run_ranks(
        2, "fit", tmp_path, *DROPPING, "length.steps=20", "checkpoint.every_steps=2",
        "evaluate.every_steps=4", "strategy=fsdp2", "watchdog.timeout=2", f"model.when={when}",
        "model.several=true", expect=64,
    )  # fmt: skip
    sentence = r"Rank 0 calls (layers\.\d|no module) where rank 1 calls (layers\.\d|no module), but"
    for done in found:
        assert re.search(sentence, done.stderr)
    assert re.search(sentence, (tmp_path / "hangs/attempt-1/report.txt").read_text())
    assert checkpoints(tmp_path)[-1] < 20


@pytest.mark.fast
def test_parameters_without_a_path_are_found():
    used, detached, idle = (nn.Parameter(torch.ones(2)) for _ in range(3))
    named = {"used": used, "detached": detached, "idle": idle}.items()
    loss = (Detour.apply(used) + detached.detach()).sum() + (idle * used).detach().sum()
    assert not_reached(loss, named) == ["detached", "idle"]
    hidden = torch.utils.checkpoint.checkpoint(lambda x: x * idle, used, use_reentrant=True).sum()
    assert not_reached(hidden, named) == []
    shown = torch.utils.checkpoint.checkpoint(lambda x: x * idle, used, use_reentrant=False).sum()
    assert not_reached(shown, named) == ["detached"]


@pytest.mark.fast
def test_only_what_every_rank_leaves_out_is_unused():
    def found(ranks):
        return unused_everywhere(ranks, own[ranks.rank])

    own = [{"a", "b"}, {"b", "c"}, {"b"}]
    assert on_ranks(3, found) == [{"b"}] * 3
    own = [{"a"}, set()]
    assert on_ranks(2, found) == [set()] * 2


@pytest.mark.fast
@pytest.mark.parametrize("calls", [["ab", "ba"], ["ab", "a"], ["", "b"], ["aab", "ab"]])
def test_other_calls_on_another_rank_are_refused_on_all(calls):
    def forward(ranks):
        modules = {name: nn.Identity() for name in "ab"}
        with same_calls(modules, ranks):
            for name in calls[ranks.rank]:
                modules[name](torch.ones(1))

    errors = on_ranks(2, forward)
    assert all(isinstance(error, UsageError) for error in errors)
    assert str(errors[0]) == str(errors[1])


@pytest.mark.fast
@pytest.mark.parametrize(
    "calls", [["ab", "ab"], ["ab", "ba"], ["ab", "a"], ["", "b"], ["aab", "ab"], ["ab", "ab", "bb"]]
)
def test_recorded_calls_are_compared(calls):
    def forward(ranks):
        modules = {name: nn.Identity() for name in "ab"}
        root = nn.Identity()
        record = CallRecord(modules, root, ranks)
        modules["b"](torch.ones(1))
        record.clear()
        for name in calls[ranks.rank]:
            modules[name](torch.ones(1))
        root(torch.ones(1))
        record.check(ranks.all_reduce_ints(record.numbers()))

    errors = on_ranks(len(calls), forward)
    if len(set(calls)) == 1:
        assert errors == [None] * len(calls)
    else:
        assert all(isinstance(error, UsageError) for error in errors)
        assert len({str(error) for error in errors}) == 1


@pytest.mark.fast
@pytest.mark.parametrize(
    ("by_rank", "sentence"),
    [
        ({0: [1, 0, -1], 1: [1, 0, 1]}, "Rank 0 calls no module where rank 1 calls b"),
        ({2: [1, 0], 5: [1, 0, 1], 7: [1, 1]}, "Rank 2 calls a where rank 7 calls b"),
        ({0: [1, 0], 1: [1, 0, 1]}, None),  # rank 0 may be slow
        ({0: [1, 0, -1], 1: [2, 1]}, None),  # another step
        ({0: [1, 0, -1], 1: []}, None),
        ({0: [1, 0, -1], 1: [1, 9]}, None),
        ({0: [1, 0, -1]}, None),
        ({}, None),
    ],
)
def test_the_calls_of_a_run_that_hangs_are_compared(by_rank, sentence):
    record = CallRecord({name: nn.Identity() for name in "ab"}, nn.Identity(), None)
    found = record.fault(by_rank)
    assert found is None if sentence is None else sentence in found


@pytest.mark.fast
def test_the_same_calls_pass_and_leave_no_hook():
    def forward(ranks):
        modules = {name: nn.Identity() for name in "ab"}
        with same_calls(modules, ranks):
            for name in "abba":
                modules[name](torch.ones(1))
        return [len(module._forward_pre_hooks) for module in modules.values()]

    assert on_ranks(2, forward) == [[0, 0], [0, 0]]
