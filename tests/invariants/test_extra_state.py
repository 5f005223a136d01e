"""Modules that keep state of their own, or reassign buffers: this survives a resume on every
strategy, and an export."""

import json
import shutil

import pytest
import torch
from torch import nn

import train
from tests.support.forked import run, run_ranks
from tests.support.lanes import thinned
from tests.support.runs import assert_same_bits, checkpoints, curve, tensors
from tests.support.tiny import TinyTask

BASE = [
    "task.use=tests.invariants.test_extra_state:Task", "batch.micro_batch_size=6",
    "length.steps=6", "checkpoint.every_steps=3", "checkpoint.keep_last=9",
    "evaluate.every_steps=3", "model.dropout=0.0",
]  # fmt: skip


class Fading(nn.Module):
    """Scales by a number that falls with each forward pass, and adds the mean of past inputs. Has
    buffers that get another shape, another dtype, and their first value in the first step."""

    def __init__(self):
        super().__init__()
        self.calls, self.center = 0, torch.zeros(4)
        self.register_buffer("wide", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("late", None)

    def get_extra_state(self):
        return {"calls": self.calls, "center": self.center}

    def set_extra_state(self, state):
        self.calls, self.center = state["calls"], state["center"]

    def forward(self, x):
        if self.training:
            self.calls += 1
            self.center = 0.9 * self.center + 0.1 * x.detach().mean(0)
            self.wide = 0.9 * self.wide + self.center
            self.late = self.center.sum() if self.late is None else self.late + self.center.sum()
        return (
            x / (1 + 0.1 * self.calls)
            + self.center
            + self.wide
            + (0 if self.late is None else self.late)
        )


class Task(TinyTask):
    def build_model(self):
        return nn.Sequential(super().build_model(), Fading())


def fit(directory, ranks, strategy):
    if ranks == 1:
        run("fit", directory, *BASE)
    else:
        run_ranks(ranks, "fit", directory, *BASE, f"strategy={strategy}")


def interrupted(directory, to):
    """A copy of a finished run, as if it had ended after its third step."""
    shutil.copytree(directory, to)
    (to / "finished.json").unlink()
    shutil.rmtree(to / f"checkpoints/step-{checkpoints(to)[-1]:012d}")
    assert checkpoints(to)[-1] == 3
    return to


PLACEMENTS = [(1, "single"), *((2, s) for s in ("ddp", "fsdp2", "zero1", "zero2", "zero3"))]


@pytest.mark.parametrize(("ranks", "strategy"), thinned(PLACEMENTS, kept=[(2, "zero3")]))
def test_extra_state_survives_a_resume(tmp_path, ranks, strategy):
    whole = tmp_path / "whole"
    fit(whole, ranks, strategy)
    found = tensors(whole)
    assert found["extra.1._extra_state.0"].abs().sum() > 0
    again = interrupted(whole, tmp_path / "again")
    fit(again, ranks, strategy)
    assert curve(again, "train/loss") == curve(whole, "train/loss")
    assert_same_bits(tensors(again), found)


@pytest.mark.slow
def test_extra_state_is_evaluated_and_exported(tmp_path):
    directory, exported = tmp_path / "run", tmp_path / "exported"
    fit(directory, 1, "single")
    done = run("evaluate", directory, *BASE, "--json")
    assert json.loads(done.stdout)["loss"] == pytest.approx(curve(directory, "eval/loss")[6])
    assert "all well" in run("verify", directory, *BASE).stdout
    run("export", directory, *BASE, "--to", exported)
    module = train.load(exported, trust=True)
    assert module[1].calls == 12, "6 steps of 2 micro-batches"
    for name in ("wide", "late"):
        assert torch.equal(getattr(module[1], name), tensors(directory)[f"model.1.{name}"])
    assert torch.equal(module[1].center, tensors(directory)["extra.1._extra_state.0"])
    program = torch.export.load(exported / "model.pt2").module()
    inputs = torch.ones(3, 8)
    torch.testing.assert_close(program(inputs), module(inputs))


class Opaque(TinyTask):
    def build_model(self):
        model = nn.Sequential(super().build_model(), Fading())
        model[1].center = lambda: 0
        return model


def test_state_that_is_not_data_is_refused_before_the_first_step(tmp_path):
    words = [*BASE, "task.use=tests.invariants.test_extra_state:Opaque"]
    done = run("fit", tmp_path, *words, expect=64)
    assert "get_extra_state() of the Fading '1' returned a value" in done.stderr
    assert "contains a builtins.function" in done.stderr
    assert not (tmp_path / "attempts.jsonl").exists()


class Registers(nn.Module):
    def forward(self, x):
        if not hasattr(self, "seen"):
            self.register_buffer("seen", torch.zeros(1))
        return x


class AddsBuffer(TinyTask):
    def build_model(self):
        return nn.Sequential(super().build_model(), Registers())

    def eval_dataset(self):
        return None


class AddsBufferInEvaluation(AddsBuffer):
    def eval_dataset(self):
        return TinyTask.eval_dataset(self)


def test_a_buffer_that_is_registered_in_the_first_evaluation_is_refused(tmp_path):
    words = [*BASE, "task.use=tests.invariants.test_extra_state:AddsBufferInEvaluation"]
    done = run("fit", tmp_path, *words, expect=64)
    assert "The first evaluation registered the buffer 1.seen" in done.stderr
    assert not (tmp_path / "attempts.jsonl").exists()


def test_a_buffer_that_is_registered_in_a_step_is_refused(tmp_path):
    words = [*BASE, "task.use=tests.invariants.test_extra_state:AddsBuffer"]
    done = run("fit", tmp_path, *words, "evaluate.every_steps=null", expect=64)
    assert "The first step registered the buffer 1.seen" in done.stderr
