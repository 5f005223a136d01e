"""A dataset that records the process and the random numbers of each sample, and its loaders."""

import os
import random

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from train.data.loader import evaluation_batches, training_batches
from train.data.loader_config import LoaderConfig
from train.data.order import SampleOrder
from train.data.plan import BatchPlan, EvalPlan


class Numbers(Dataset):
    """Index, three random numbers, and the process that loaded them."""

    def __init__(self, size=23):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        noise = [torch.rand(()).item(), random.random(), np.random.rand()]
        return {
            "index": index,
            "noise": torch.tensor(noise, dtype=torch.float64),
            "pid": os.getpid(),
        }


def load(dataset, **how):
    with make(dataset, **how) as batches:
        return list(batches)


def make(
    dataset,
    *,
    world=1,
    rank=0,
    micro=None,
    workers=0,
    start=0,
    steps=8,
    collate=default_collate,
    **options,
):
    return training_batches(
        dataset,
        SampleOrder(1, len(dataset)),
        BatchPlan(6, micro, world),
        rank,
        collate=collate,
        config=LoaderConfig(workers=workers, **options),
        device_type="cpu",
        start_position=start * 6,
        steps=steps,
    )


def evaluate(dataset, *, world=1, rank=0, **options):
    return evaluation_batches(
        dataset,
        EvalPlan(len(dataset), 4, world),
        rank,
        seed=1,
        collate=default_collate,
        config=LoaderConfig(**options),
        device_type="cpu",
    )
