"""The language model's loss, its metrics, and the text it generates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from train.tasks.base import Ratio
from train.tasks.text.generate import generate
from train.tasks.text.task import TextTask

MakeTask = Callable[..., TextTask]
CPU = torch.device("cpu")


class Uniform(nn.Module):
    """Assigns the same probability to each of ``vocabulary`` tokens."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*tokens.shape, self.vocabulary)


class Successor(nn.Module):
    """Expects each token to be followed by the next id; records the shapes it is called with."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(tokens.shape))
        following = (tokens + 1) % self.vocabulary
        return 20.0 * nn.functional.one_hot(following, self.vocabulary).float()


def batch_of(task: TextTask, indices: list[int]) -> Any:
    return task.collate(task.train_dataset().__getitems__(indices))


def test_bits_per_byte_of_a_uniform_model_by_hand(make_text_task: MakeTask, corpus: Any) -> None:
    task = make_text_task({"files": corpus, "context": 64})
    dataset = task.eval_dataset()
    batch = task.collate([dataset[n] for n in range(len(dataset))])
    measured = task.measure(Uniform(256), {**batch, "targets": batch["targets"].clamp(max=255)})
    totals = {name: Ratio(float(r.sum), float(r.count)) for name, r in measured.items()}
    documents = int((batch["targets"] == 256).sum())
    size = int(batch["bytes"].sum())
    # 8 bits for each byte and each end of document; an end stands for no byte.
    assert totals["loss"] == pytest.approx((math.log(256) * (size + documents), size + documents))
    bits, counted = totals["bits_per_byte"]
    assert counted == size
    assert bits == pytest.approx(8 * (size + documents))
    assert task.derive(totals) == {"perplexity": pytest.approx(256, rel=1e-5)}


def test_a_perplexity_that_overflows_is_infinite(make_text_task: MakeTask) -> None:
    assert make_text_task().derive({"loss": Ratio(2000.0, 1.0)}) == {"perplexity": math.inf}


@pytest.mark.parametrize("pack", [True, False])
def test_sums_and_counts_add_up_over_micro_batches(
    make_text_task: MakeTask, corpus: Any, pack: bool
) -> None:
    task = make_text_task({"files": corpus, "pack": pack, "context": 30})
    model = task.build_model()
    last = len(task.train_dataset())
    indices = list(range(last))
    parts = [batch_of(task, indices[a:b]) for a, b in ((0, 1), (1, 6), (6, last))]
    with torch.no_grad():
        whole = task.measure(model, batch_of(task, indices))
        split = [task.measure(model, part) for part in parts]
    for name, total in whole.items():
        assert sum(float(s[name].sum) for s in split) == pytest.approx(float(total.sum), rel=1e-5)
        assert sum(int(s[name].count) for s in split) == int(total.count)
    assert [task.count(part) for part in parts] == [
        int(task.loss(model, part).count) for part in parts
    ]
    if not pack:
        assert task.count(parts[2]) < parts[2]["targets"].numel()


def test_the_loss_ignores_padding(make_text_task: MakeTask, corpus: Any) -> None:
    task = make_text_task({"files": corpus, "pack": False, "context": 200})
    model, batch = task.build_model(), batch_of(task, [0, 1, 2])
    padded = batch["targets"] == -100
    assert padded.any()
    other = {**batch, "tokens": batch["tokens"].masked_fill(padded, 7)}
    assert torch.equal(task.loss(model, batch).sum, task.loss(model, other).sum)


def test_the_model_learns_the_corpus(make_text_task: MakeTask, corpus: Any) -> None:
    task = make_text_task({"files": corpus, "context": 32}, {"width": 32})
    torch.manual_seed(0)
    model, indices = task.build_model(), list(range(len(task.train_dataset())))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = task.loss(model, batch_of(task, indices))
        (loss.sum / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.sum.detach() / loss.count) < 0.5 * task.facts()["unigram_entropy"]


def test_the_sample_is_reproducible_and_keeps_the_rng_state(make_text_task: MakeTask) -> None:
    task = make_text_task(task={"prompt": "Why é", "sample_tokens": 40})
    model = task.build_model().train()
    state = torch.get_rng_state()
    text = task.report(model, CPU)["sample"]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert text.startswith("Why é")
    torch.manual_seed(99)
    assert task.report(model, CPU)["sample"] == text
    other = make_text_task(task={"prompt": "Why é", "sample_tokens": 40}, seed=2)
    assert other.report(model, CPU)["sample"] != text
    short = task.check_report(model, CPU)["sample"]
    assert len("Why é") < len(short) < len(text)
    assert text.startswith(short)
    without = make_text_task(task={"sample_tokens": 0})
    assert without.report(model, CPU) == without.check_report(model, CPU) == {}


def test_generation_follows_the_model_past_its_context() -> None:
    model = Successor(50)
    tokens = generate(
        model, [0, 1], 20, 8, padding=49, temperature=0.0, top_k=None, seed=0, device=CPU
    )
    assert tokens == list(range(2, 22))
    assert set(model.shapes) == {(1, 8)}
    assert len(model.shapes) == 20


def test_the_sample_continues_the_prompt(make_text_task: MakeTask) -> None:
    task = make_text_task(task={"prompt": "abc", "sample_tokens": 4, "sample_temperature": 0.0})
    assert task.report(Successor(257), CPU)["sample"] == "abcdefg"


def test_top_k_draws_from_the_most_probable_only() -> None:
    class Ramp(nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.arange(10.0).expand(*tokens.shape, 10) / 10

    def draw(top_k: int | None, temperature: float = 1.0) -> set[int]:
        return set(
            generate(
                Ramp(), [0], 300, 4, 0, temperature=temperature, top_k=top_k, seed=3, device=CPU
            )
        )

    assert draw(None) == set(range(10))
    assert draw(3) == {7, 8, 9}
    assert draw(1) == draw(None, temperature=0.0) == {9}


def test_invalid_utf_8_becomes_the_replacement_character(make_text_task: MakeTask) -> None:
    class Broken(nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return nn.functional.one_hot(torch.full_like(tokens, 0xFF), 257) * 50.0

    task = make_text_task(task={"prompt": "x", "sample_tokens": 2})
    assert task.report(Broken(), CPU)["sample"] == "x\ufffd\ufffd"


def test_facts_cover_both_splits(make_text_task: MakeTask, corpus: Any) -> None:
    task = make_text_task({"files": corpus, "validation": 2})
    facts = task.facts()
    assert (facts["train_documents"], facts["validation_documents"]) == (10, 2)
    for side, dataset in (("train", task.train_dataset()), ("validation", task.eval_dataset())):
        batch = task.collate([dataset[n] for n in range(len(dataset))])
        assert facts[f"{side}_tokens"] == task.count(batch)
    assert 0 < facts["unigram_entropy"] < math.log(257)


def test_example_inputs_and_flops(make_text_task: MakeTask) -> None:
    task = make_text_task({"context": 16})
    model = task.build_model()
    (tokens,) = task.example_inputs()
    assert tokens.shape == (2, 16)
    assert model(tokens).shape == (2, 16, 257)
    state = torch.get_rng_state()
    flops = task.flops_per_sample()
    assert torch.equal(torch.get_rng_state(), state)
    assert flops == 16 * model.flops_per_token(16) > 0
