"""Generates text from a language model."""

from __future__ import annotations

import torch
from torch import nn

from train.tasks.modes import evaluating


def generate(
    model: nn.Module,
    prompt: list[int],
    length: int,
    context: int,
    padding: int,
    *,
    temperature: float,
    top_k: int | None,
    seed: int,
    device: torch.device,
) -> list[int]:
    """``length`` tokens after ``prompt`` (at least one token), each drawn from the model's softmax
    at ``temperature`` over the ``top_k`` most probable tokens (Fan et al., 2018, "Hierarchical
    neural story generation"); temperature 0 takes the most probable.

    The model maps tokens (1, context) int64 to logits. It is called exactly ``length`` times, with
    a constant shape: all ranks of a sharded model must make the same calls, and torch.compile
    recompiles for each new shape. ``padding`` fills the input; a causal model ignores it. Random
    numbers come from a separate CPU generator with ``seed``.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    with evaluating(model), torch.no_grad():
        for _ in range(length):
            seen = tokens[-context:]
            window = torch.full((1, context), padding)
            window[0, : len(seen)] = torch.tensor(seen)
            logits = model(window.to(device))[0, len(seen) - 1].float().cpu()
            tokens.append(_draw(logits, temperature, top_k, generator))
    return tokens[len(prompt) :]


def _draw(
    logits: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    probabilities = torch.softmax((logits - logits.max()) / temperature, dim=0)
    return int(torch.multinomial(probabilities, 1, generator=generator))
