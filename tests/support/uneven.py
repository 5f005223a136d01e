"""Models of which a micro-batch uses a part only, or by other methods than ``forward``."""

import os

import torch
from torch import nn

from tests.support.tiny import Noisy, TinyTask
from train import Ratio, Section
from train.section import non_semantic

WIDTH = 12


class Experts(nn.Module):
    """Layers of which a call uses one; ``scale`` has no dimensions and is used with the last."""

    def __init__(self, number):
        super().__init__()
        self.first, self.last = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(number))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, x, chosen):
        x = torch.tanh(self.first(x))
        if chosen is not None:
            x = x + torch.tanh(self.experts[chosen](x))
            if chosen == len(self.experts) - 1:
                x = x * self.scale
        return self.last(x)


class ExpertsTask(TinyTask):
    """The first sample of a micro-batch decides which expert is used, if any."""

    class Model(Section):
        experts: int = 3
        """Experts."""
        whole: bool = True
        """Whether the model is gathered as a whole."""

    def build_model(self):
        return Experts(self.config.model.experts)

    def blocks(self, model):
        return [model] if self.config.model.whole else []

    def train_dataset(self):
        return Noisy(61, augment=True)

    def loss(self, model, batch):
        experts = self.config.model.experts
        errors = 0
        for x, y, mask in zip(batch["x"], batch["y"], batch["mask"], strict=True):
            chosen = int(x[0] * 3) % (experts + 2)
            chosen = chosen if chosen < experts else None
            errors = errors + ((model(x, chosen) - y).square() * mask).sum()
        return Ratio(errors, batch["mask"].sum())


class Encoder(nn.Module):
    """Has no ``forward``."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 4)
        self.own = nn.Parameter(torch.full((8,), 0.5))
        self.scale = nn.Parameter(torch.tensor(0.7))

    def encode(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * self.own
        return x

    def decode(self, x):
        return self.head(x) * self.scale


class EncoderTask(TinyTask):
    """Uses methods and parts of the model."""

    class Options(TinyTask.Options):
        dtype: str | None = non_semantic(None)
        """The dtype that the loss expects of a product."""
        bypass: bool = non_semantic(False)
        """Use a parameter of a block beside its ``forward``."""
        freeze_at: int | None = non_semantic(None)
        """Step from which on a parameter is frozen."""
        unfreeze_at: int | None = non_semantic(None)
        """Step from which on a frozen parameter is trained."""

    def build_model(self):
        model = Encoder()
        model.own.requires_grad_(self.config.task.unfreeze_at is None)
        return model

    def blocks(self, model):
        return list(model.layers)

    def train_dataset(self):
        return Noisy(61, augment=True)

    def loss(self, model, batch):
        options = self.config.task
        if model.training and torch.is_grad_enabled():
            samples = self.calls * len(batch["x"]) * int(os.environ.get("WORLD_SIZE", "1"))
            step = samples // self.config.batch.global_batch_size
            self.calls += 1
            if step == options.freeze_at:
                model.own.requires_grad_(False)
            if step == options.unfreeze_at:
                model.own.requires_grad_(True)
        found = model.decode(model.encode(batch["x"])) + model.head.bias
        if options.bypass:
            found = found + model.layers[0].bias.sum()
        if options.dtype:
            product = batch["x"] @ model.head.weight.t()
            assert product.dtype == getattr(torch, options.dtype), product.dtype
        errors = (found - batch["y"]).square() * batch["mask"]
        return Ratio(errors.sum(), batch["mask"].sum())

    def report(self, model, device):
        shape = tuple(model.encode(torch.ones(2, 8, device=device)).shape)
        return {"shape": str(shape)}


class OddRankTask(TinyTask):
    """Builds something else on rank 1."""

    class Options(TinyTask.Options):
        odd: str = non_semantic("")
        """What differs: ``train``, ``eval`` or ``model``."""

    def is_odd(self, part):
        return self.config.task.odd == part and os.environ.get("RANK") == "1"

    def build_model(self):
        if self.is_odd("model"):
            torch.manual_seed(1)
        return super().build_model()

    def train_dataset(self):
        return Noisy(60 if self.is_odd("train") else 61, augment=True)

    def eval_dataset(self):
        return Noisy(36 if self.is_odd("eval") else 37, augment=True)


class Dropping(nn.Module):
    """Leaves out some of its layers, as stochastic depth does."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, left_out):
        x = self.last(torch.tanh(self.first(x)))
        for number, layer in enumerate(self.layers):
            if number not in left_out:
                x = x + torch.tanh(layer(x))
        return x


class DroppingTask(TinyTask):
    """The first sample of a micro-batch decides which layer is left out, or how many, after two
    steps, or in evaluations."""

    class Model(Section):
        when: str = "training"
        """training, evaluation or never."""
        several: bool = False
        """Whether more than one may be left out: the last ones of the forward pass."""

    def build_model(self):
        return Dropping()

    def loss(self, model, batch):
        self.calls += model.training
        here = "training" if model.training else "evaluation"
        drops = self.config.model.when == here and self.calls > 2
        drawn = int(batch["x"][0, 0] * 50) % 3
        left_out = (range(drawn, 3) if self.config.model.several else [drawn]) if drops else [2]
        errors = (model(batch["x"], left_out) - batch["y"]).square() * batch["mask"]
        return Ratio(errors.sum(), batch["mask"].sum())


class DataDependentTask(TinyTask):
    """The model has as many inputs as the training data."""

    features = 3

    def train_dataset(self):
        data = super().train_dataset()
        self.features = len(data[0]["x"])
        if self.config.model.attribute:
            self.found = self.features
        return data

    class Model(TinyTask.Model):
        attribute: bool = False
        """Whether the model cannot be built without the data at all."""

    def build_model(self):
        width = self.found if self.config.model.attribute else self.features
        return nn.Linear(width, 4)
