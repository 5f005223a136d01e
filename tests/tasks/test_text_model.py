"""The transformer is causal, initialised as in the literature, and can be compiled and exported."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from train.tasks.text.model import Transformer, rotary_angles, rotate
from train.tasks.text.task import TextTask

VOCABULARY, CONTEXT = 50, 24
VARIANTS = [
    {"positions": p, "norm": n, "mlp": m}
    for p, n, m in itertools.product(
        ("rotary", "learned"), ("rmsnorm", "layernorm"), ("gelu", "swiglu")
    )
]


def build(seed: int = 0, **fields: Any) -> Transformer:
    torch.manual_seed(seed)
    config = TextTask.Model(**({"layers": 3, "heads": 2, "width": 32} | fields))
    return Transformer(config, VOCABULARY, CONTEXT).eval()


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("fields", VARIANTS, ids=lambda f: "-".join(f.values()))
def test_a_later_token_does_not_change_earlier_logits(fields: dict[str, str]) -> None:
    model, tokens = build(**fields), random_tokens(2, CONTEXT)
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % VOCABULARY
    before, after = model(tokens), model(changed)
    assert before.shape == (2, CONTEXT, VOCABULARY)
    assert torch.equal(before[:, :10], after[:, :10])
    assert ((before[:, 10:] - after[:, 10:]).abs().amax(-1) > 0).all()


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_the_order_of_earlier_tokens_matters(positions: str) -> None:
    # One layer without positions would see the tokens before the last as a set.
    model, tokens = build(positions=positions, layers=1), random_tokens(1, CONTEXT)
    swapped = tokens.clone()
    swapped[0, [2, 9]] = tokens[0, [9, 2]]
    assert tokens[0, 2] != tokens[0, 9]
    assert not torch.allclose(model(tokens)[0, -1], model(swapped)[0, -1], atol=1e-7)


def test_rotary_keeps_length_and_depends_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_angles(20, 8, 10000.0, torch.device("cpu"))

    def score(i: int, j: int) -> float:
        at = lambda x, t: rotate(x, cos[t : t + 1], sin[t : t + 1])  # noqa: E731
        return float((at(q, i) * at(k, j)).sum())

    assert score(7, 3) == pytest.approx(score(16, 12), abs=1e-5)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)
    turned = rotate(q, cos[19:], sin[19:])
    assert float(turned.norm()) == pytest.approx(float(q.norm()))
    assert torch.equal(rotate(q, cos[:1], sin[:1]), q)


def test_a_tied_head_is_the_embedding() -> None:
    tied, untied = build(tied=True), build(tied=False)
    assert tied.head.weight is tied.embedding.weight
    count = [sum(p.numel() for p in m.parameters()) for m in (tied, untied)]
    assert count[1] - count[0] == VOCABULARY * 32


def test_residual_projections_start_smaller_with_depth() -> None:
    torch.manual_seed(0)
    config = TextTask.Model(layers=8, heads=4, width=128)
    model = Transformer(config, 1000, 16)
    residual, other = 0, 0
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            writes = name.endswith(("attention.out", "mlp.down"))
            expected = 0.02 / (2 * 8) ** 0.5 if writes else 0.02
            assert float(module.weight.detach().std()) == pytest.approx(expected, rel=0.05), name
            residual, other = residual + writes, other + (not writes)
    assert (residual, other) == (16, 2 + 8 * 3)


def test_dropout_acts_in_training_only() -> None:
    model, tokens = build(dropout=0.5), random_tokens(1, CONTEXT)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_bfloat16_autocast_gives_float32_logits_near_the_exact_ones() -> None:
    model, tokens = build(), random_tokens(2, CONTEXT)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
    assert logits.dtype == torch.float32
    exact = model(tokens)
    assert not torch.equal(logits, exact)
    assert torch.allclose(logits, exact, atol=0.05)


@pytest.mark.slow
@pytest.mark.normal
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_an_exported_program_accepts_any_batch_size(positions: str) -> None:
    model = build(positions=positions)
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        model, (random_tokens(2, CONTEXT),), dynamic_shapes=({0: batch},)
    ).module()
    tokens = random_tokens(5, CONTEXT)
    assert torch.allclose(program(tokens), model(tokens), atol=1e-6)


@pytest.mark.slow
@pytest.mark.normal
def test_the_traced_model_is_one_graph() -> None:
    model, tokens = build(), random_tokens(2, CONTEXT)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(tokens).sum().backward()
    assert torch.allclose(compiled(tokens), model(tokens), atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"width": 33, "heads": 2}, ["model.width (33)", "model.heads (2)"]),
        ({"width": 6, "heads": 2}, ["model.heads", "even", "model.positions"]),
        ({"width": 8, "heads": 2, "context": 9}, ["model.context (9)", "model.positions"]),
    ],
)
def test_invalid_shapes_are_reported_by_name(fields: dict[str, int], names: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        TextTask.Model(**fields)
    for name in names:
        assert name in str(caught.value)


def test_flops_follow_palm_and_exclude_the_lookup() -> None:
    width, layers = 32, 3
    block = 4 * width**2 + 8 * width**2
    multiplied = layers * block + VOCABULARY * width
    expected = 6 * multiplied + 12 * layers * width * CONTEXT
    for fields in ({}, {"tied": False}, {"positions": "learned"}):
        assert build(mlp="gelu", **fields).flops_per_token(CONTEXT) == expected
