"""What a run that is out of memory says: numbers, and what each remedy saves."""

import re

import pytest
import torch
from torch import nn

from tests.support.forked import run, run_ranks
from train.loop.memory_advice import Activations, Needs, advice, count_saved

MIB = 2**20


def needs(**changes):
    usual = {
        "weights": 100 * MIB, "gradients": 100 * MIB, "optimizer": 200 * MIB,
        "shardable": 400 * MIB, "activations": Activations(10.0 * MIB, 6.0 * MIB),
        "capacity": 1000 * MIB, "micro_batch_size": 80, "world_size": 4,
    }  # fmt: skip
    return Needs(**(usual | changes))


def test_each_remedy_has_its_number():
    text = advice(needs())
    assert "weights 100 MiB, gradients 100 MiB, optimiser state 200 MiB" in text
    assert "800 MiB of activations for a micro-batch of 80 (10 MiB per sample); there are" in text
    assert "activation_checkpointing=true saves about 480 MiB" in text
    assert "strategy=fsdp2 on 4 ranks saves about 300 MiB" in text


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, 40),  # half, although 50 would leave no room for temporary tensors
        ({"capacity": 700 * MIB}, 23),  # (0.9 * 700 - 400) / 10
        ({"capacity": 300 * MIB}, 1),
        ({"capacity": None}, 40),
        ({"micro_batch_size": 3}, 1),
    ],
)
def test_the_micro_batch_that_fits_is_named(changes, size):
    assert f"batch.micro_batch_size={size} needs about" in advice(needs(**changes))


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({"micro_batch_size": 1}, "batch.micro_batch_size"),
        ({"activations": Activations(10.0, 0.0)}, "activation_checkpointing"),
        ({"activations": None}, "activation_checkpointing"),
        ({"shardable": 0}, "fsdp2"),
    ],
)
def test_what_cannot_help_is_not_named(changes, absent):
    assert absent not in advice(needs(**changes))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()) for _ in range(3)
        )

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.sum()


def test_saved_activations_are_counted_once():
    """A linear layer keeps its input and a tanh its output, which is the next layer's input: x, and
    two tensors of each block."""
    model = Blocks()
    with count_saved(model, list(model.blocks)) as saved:
        model(torch.zeros(5, 8))
    assert saved.total() == 7 * (5 * 8 * 4)
    assert 0 < saved.recomputed() < saved.total()


def test_a_run_ends_with_the_numbers(tmp_path):
    done = run("fit", tmp_path, "task.use=tests.faults.tasks:Hungry", expect=71)
    text = " ".join(done.stderr.split())
    assert "Each rank has weights 976 bytes, gradients 976 bytes, optimiser state 1.91 KiB" in text
    assert re.search(r"activations for a micro-batch of 12 \(\d+ bytes per sample\); there", text)
    assert "batch.micro_batch_size=6 needs about" in text
    assert "strategy=fsdp2 on 2 ranks saves about 1.91 KiB" in text
    assert "Traceback" not in done.stderr
    assert "torch.empty" in (tmp_path / "logs/rank-0.log").read_text()  # the place in the code


@pytest.mark.slow
def test_a_sharded_run_needs_no_other_rank_for_it(tmp_path):
    words = ["task.use=tests.faults.tasks:Hungry", "strategy=fsdp2", "batch.global_batch_size=24"]
    for rank in run_ranks(2, "fit", tmp_path, *words, expect=71):
        assert "Try batch.micro_batch_size=6" in rank.stderr
