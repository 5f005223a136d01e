"""Datasets and models are drawn from the run's seed, in a run and in other commands alike."""

import torch
from torch import nn
from torch.utils.data import TensorDataset, random_split

import train
from tests.support.runs import TINY
from train import Ratio, Task
from train.config.load import load_config
from train.distributed.collectives import Collectives
from train.setup.build import build_data

QUICK = [*TINY, "length.steps=4", "schedule.warmup_steps=2", "track.console=quiet"]
CPU = torch.device("cpu")


class Scaled(nn.Module):
    """Its scale is in no checkpoint."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.register_buffer("scale", torch.rand(1), persistent=False)

    def forward(self, x):
        return self.linear(x) * self.scale


class RandomSplit(Task):
    """Splits its data at random, as many users do, in each of the two functions."""

    def build_model(self):
        return Scaled()

    def split(self):
        return random_split(TensorDataset(torch.linspace(0.0, 1.0, 50)[:, None]), [0.8, 0.2])

    def train_dataset(self):
        return self.split()[0]

    def eval_dataset(self):
        return self.split()[1]

    def loss(self, model, batch):
        return Ratio((model(batch[0]) - batch[0]).square().sum(), len(batch[0]))


def test_a_random_split_leaves_no_training_sample_in_the_evaluation():
    loaded = load_config([], QUICK, runs=False, task=RandomSplit)
    data = build_data(loaded, loaded.task(loaded.config), Collectives(0, 1), CPU)
    assert set(data.train.indices).isdisjoint(data.evaluation.indices)


def test_evaluate_and_load_see_the_data_and_the_model_of_the_run(tmp_path):
    words = [*QUICK, f"run.dir={tmp_path / 'run'}"]
    done = train.fit(*words, task=RandomSplit)
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert train.evaluate(*words, task=RandomSplit) == done.metrics
