"""Trains on one batch until it is learnt, and says what is in the way if it is not.

A model, loss and optimiser that work can memorise one batch. If they cannot, more data does not
help. (Karpathy, 2019, "A Recipe for Training Neural Networks": "overfit a single batch".)
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from train.diagnosis.bench import Bench, Taken
from train.diagnosis.signals import Norms, Output, parameter_norms, watch_outputs
from train.suggest import listed

_VANISHED = 1e-6
"""A gradient is called vanishing below this part of the largest one, per norm of the weights."""
_EXPLODED = 1e4
"""A gradient norm is called exploding above this."""
_FLAT, _SMALL = 0.02, 0.2
"""The loss has arrived at its lowest value if, in the last quarter of the steps, it changes by less
than the first part of the first loss, and the gradient norm is below the second part of the first
one."""


class Memorized(NamedTuple):
    """How the loss on one batch went."""

    taken: list[Taken]
    target: float
    """The loss at which the batch counts as learnt."""
    outputs: list[Output]
    """Of the first forward pass, on this rank."""
    before: dict[str, Norms]
    """After the first step."""
    after: dict[str, Norms]
    """After the last step."""

    @property
    def losses(self) -> list[float]:
        """Of each step, before its update."""
        return [taken.loss for taken in self.taken]

    @property
    def learnt(self) -> bool:
        """Whether the target was reached."""
        return self.is_finite and bool(self.taken) and self.taken[-1].loss <= self.target

    @property
    def is_finite(self) -> bool:
        """Whether all steps had finite losses and gradients."""
        return all(taken.is_finite for taken in self.taken)


def memorize(bench: Bench, learning_rate: float, steps: int, ratio: float) -> Memorized:
    """Repeats the first step's batch up to ``steps`` times, until the loss is ``ratio`` times the
    first one; collective. Samples, augmentation and dropout are the same in each repetition."""
    with bench.batches(1) as batches:
        batch = [next(batches) for _ in range(bench.plan.accumulation)]
    taker = bench.steps(lambda step: learning_rate)
    taken: list[Taken] = []
    with watch_outputs(bench.strategy.bare_model) as outputs:
        taken.append(taker.take(batch))
    before = parameter_norms(bench.strategy)
    target = ratio * taken[0].loss if taken[0].loss > 0.0 else -math.inf
    while taken[-1].is_finite and taken[-1].loss > target and len(taken) < steps:
        taken.append(taker.take(batch))
    return Memorized(taken, target, outputs, before, parameter_norms(bench.strategy))


def findings(result: Memorized, learning_rate: float) -> list[str]:
    """What is in the way of learning, the most likely cause first, a sentence each. Of a batch that
    was learnt, what has had no part in it."""
    if result.learnt:
        return _unmoved(result.before, result.after)
    if not result.is_finite:
        return [_not_finite(result)]
    found = [
        *_outputs(result.outputs),
        *_gradients(result.before),
        *_unmoved(result.before, result.after),
    ]
    return found or [_course(result.taken, learning_rate)]


def _not_finite(result: Memorized) -> str:
    last = result.taken[-1]
    what = "loss" if not math.isfinite(last.loss) else "gradient norm"
    value = last.loss if what == "loss" else last.grad_norm
    text = f"The {what} is {value} in step {len(result.taken)}."
    first = next((o for o in result.outputs if not o.is_finite), None)
    if first:
        text += f" The first output that is not finite is that of {first.origin}."
    elif len(result.taken) > 1:
        text += " Lower optim.lr, or set optim.clip_norm=1.0."
    else:
        text += " All modules have finite outputs: look at the loss itself."
    return text


def _unmoved(before: Mapping[str, Norms], after: Mapping[str, Norms]) -> list[str]:
    names = [name for name in after if after[name].digest == before[name].digest]
    if not names:
        return []
    if len(names) == len(after):
        return [
            "No parameter has changed: the loss does not depend on the parameters, or the learning "
            "rate is too small for their precision."
        ]
    return [
        f"{len(names)} of {len(after)} parameters never move: {listed(names, 5)}. They get no "
        "gradient or a gradient of 0; see whether forward() uses them."
    ]


def _gradients(norms: Mapping[str, Norms]) -> list[str]:
    gradients = {name: n.gradient for name, n in norms.items() if n.gradient}
    if not gradients:
        return []
    largest = max(gradients.values())
    found = []
    small = [name for name, value in gradients.items() if value < _VANISHED * largest]
    if small:
        found.append(
            f"Gradients vanish in {listed(small, 5)}: below {_VANISHED:g} of the largest one. "
            "Look for saturated activations (sigmoid, tanh), missing residual connections or "
            "normalisation, or a factor close to 0 behind them."
        )
    if largest > _EXPLODED:
        worst = max(gradients, key=lambda name: gradients[name])
        found.append(
            f"Gradients explode: {worst} has the norm {largest:.2g}. Scale inputs and targets to "
            "about 1, divide the loss by its count, or look at the initial values behind it."
        )
    return found


def _outputs(outputs: Sequence[Output]) -> list[str]:
    found = []
    zero = [o for o in outputs if o.is_zero]
    dead = [o for o in zero if not any(other.is_inside(o) for other in zero)]
    if dead:
        found.append(
            f"Dead activations: the output of {listed([_named(o) for o in dead], 3)} is 0 for "
            "every sample. Look at its inputs and biases: a ReLU whose inputs are all negative "
            "passes no gradient."
        )
    same = next((o for o in outputs if o.same_for_all and not o.is_zero), None)
    if same is None:
        return found
    inner = next((o for o in outputs if o.same_input and o.is_inside(same)), None)
    if inner and found:
        return found  # the dead activations are the reason
    text = (
        f"The output ignores the input: {_named(same)} returns the same for all samples, although "
        "their inputs differ."
    )
    if inner and inner.zero_input:
        text += (
            f" The input of {_named(inner)} is 0 for every sample: activations in front of it are "
            "dead, or forward() multiplies by 0."
        )
    elif inner:
        text += f" The input of {_named(inner)} is the same for all of them already."
    return [*found, text]


def _named(output: Output) -> str:
    return f"{output.module} ({output.kind})"


def _course(taken: Sequence[Taken], learning_rate: float) -> str:
    losses = [t.loss for t in taken]
    first, last, lowest = losses[0], losses[-1], min(losses)
    recent = losses[-max(2, len(losses) // 4) :]
    ups = sum(b > a for a, b in itertools.pairwise(recent))
    if first <= 0.0:
        return (
            f"The first loss is {first:.4g}: only a loss whose best value is 0 can be judged; it "
            f"went to {last:.4g}. See whether loss() has the right sign."
        )
    if lowest >= first:
        return (
            f"The loss does not fall below its first value, {first:.4g}. Lower optim.lr (it is "
            f"{learning_rate:g}; see `isorun lr-find`), and see whether loss() has the right sign."
        )
    norm = statistics.fmean(t.grad_norm for t in taken[-len(recent) :])
    is_flat = max(recent) - min(recent) < _FLAT * first
    if is_flat and norm < _SMALL * taken[0].grad_norm:
        return (
            f"The loss stays at {last:.4g} with a gradient norm of {norm:.2g}: the labels do not "
            "fit the loss or the model. Look for equal inputs with different labels, labels "
            "outside the range of the output (a sigmoid, a ReLU), a padding label that counts, and "
            "regularisation in the loss."
        )
    if ups > len(recent) // 4:
        return (
            f"The loss goes up and down around {statistics.fmean(recent):.4g}: lower optim.lr, "
            f"which is {learning_rate:g}; `isorun lr-find` suggests one."
        )
    return (
        f"The loss still falls, from {first:.4g} to {last:.4g}: take more --steps, or raise "
        f"optim.lr, which is {learning_rate:g}; `isorun lr-find` suggests one."
    )
