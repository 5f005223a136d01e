"""A regression task that learns, and ways to break it."""

import torch
from torch import nn
from torch.utils.data import Dataset

from train import Ratio, Section, Task


class Points(Dataset):
    def __init__(self, how):
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(64, 6, generator=generator)
        self.y = (self.x @ torch.randn(6, 2, generator=generator)).tanh()
        if how == "overflow":
            self.x[5] = float("inf")
        if how == "contradicting":
            self.x = self.x[:1].repeat(64, 1)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "y": self.y[index]}


class Saturated(nn.Module):
    def __init__(self):
        super().__init__()
        self.deep = nn.Sequential(*[m for _ in range(12) for m in (nn.Linear(6, 6), nn.Sigmoid())])
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.deep(x))


class Aside(nn.Module):
    """Has a layer whose output is multiplied by 0."""

    def __init__(self):
        super().__init__()
        self.layer, self.aside = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x):
        return self.layer(x).clamp(-0.2, 0.2) + 0.0 * self.aside(x)


class Functional(nn.Module):
    """Has operations in ``forward`` that are no modules."""

    def __init__(self, how):
        super().__init__()
        self.how, self.trunk, self.head = how, nn.Linear(6, 32), nn.Linear(32, 2)
        if how == "functional_dead":
            nn.init.constant_(self.trunk.bias, -100.0)

    def forward(self, x):
        hidden = self.trunk(torch.ones_like(x) if self.how == "constant" else x).relu()
        if self.how == "detached_trunk":
            hidden = hidden.detach()
        if self.how == "logarithm":
            hidden = (hidden - 1e3).log()
        return self.head(hidden)


class BrokenTask(Task):
    class Options(Section):
        how: str = "not"
        """What is wrong."""

    def build_model(self):
        how = self.config.task.how
        if how == "saturated":
            return Saturated()
        if how == "aside":
            return Aside()
        if how in ("functional_dead", "constant", "detached_trunk", "logarithm"):
            return Functional(how)
        model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2))
        if how == "dead":
            nn.init.constant_(model[0].bias, -100.0)
        if how == "division":
            with torch.no_grad():
                model[2].weight.div_(0.0)
        if how == "blind":
            nn.init.zeros_(model[0].weight)
            nn.init.ones_(model[0].bias)
            model[0].requires_grad_(False)
        return model

    def train_dataset(self):
        return Points(self.config.task.how)

    def loss(self, model, batch):
        how, x = self.config.task.how, batch["x"]
        y = model(x)
        error = (y - batch["y"]).square().sum()
        if how == "detached":
            error = error.detach() + 0.0 * y.sum()
        if how == "rising":  # the gradient has the wrong sign
            error = 2.0 * error.detach() - error
        if how == "infinite":
            error = error / 0.0
        if how == "root":
            error = (y.sum() - 1e6).sqrt()
        return Ratio(error, len(x))
