"""Samples that a task leaves out, and a dataset whose length changes, are named once."""

import pytest

import train
from tests.support.runs import TINY
from tests.support.tiny import Noisy, TinyTask

WORDS = [word for word in TINY if not word.startswith("task.use")]
SHORT = [*WORDS, "length.steps=6", "schedule.warmup_steps=0", "checkpoint.every_steps=2"]


class Samples(TinyTask):
    unit = "samples"

    def count(self, batch):
        return len(batch["x"])

    def loss(self, model, batch):
        total, _ = super().loss(model, batch)
        return train.Ratio(total, len(batch["x"]))


class LeavesOut(Samples):
    """Drops the samples whose index is a multiple of 10, as a filter for None does."""

    def train_dataset(self):
        class Indexed(Noisy):
            def __getitem__(self, index):
                return {**super().__getitem__(index), "index": index}

        return Indexed(103, augment=True)

    def collate(self, samples):
        return super().collate([s for s in samples if s.pop("index", 1) % 10])


class Shrinks(Samples):
    def train_dataset(self):
        class Shrinking(Noisy):
            taken = 0

            def __getitem__(self, index):
                self.taken += 1
                return super().__getitem__(index)

            def __len__(self):
                return super().__len__() - (self.taken > 40)

        return Shrinking(103, augment=True)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (LeavesOut, " of its 12 samples. If collate() leaves some out"),
        (Shrinks, "train_dataset() has 102 samples now, but had 103 at the start"),
        (Samples, None),
    ],
)
def test_what_is_left_out_is_named_once(tmp_path, capfd, task, said):
    train.fit(*SHORT, f"run.dir={tmp_path}", task=task)
    errors = capfd.readouterr().err
    if said is None:
        assert "samples" not in errors
    else:
        assert errors.count(said) == 1
