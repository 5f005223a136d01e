"""Tasks that go wrong, or that users may write, each in one way."""

import hashlib
import os
import signal
from pathlib import Path

import torch
from torch.utils.data import IterableDataset

from tests.support.tiny import Noisy, TinyTask
from train import Ratio
from train.section import harmless


class OneRankNan(TinyTask):
    """The loss of rank 1 alone is NaN at some steps; each rank leaves a digest of its weights."""

    class Options(TinyTask.Options):
        nan_on_rank_1: list[int] = harmless([])
        """Steps whose loss is NaN on rank 1."""

    def loss(self, model, batch):
        total, count = super().loss(model, batch)
        bad = model.training and self.calls in self.config.task.nan_on_rank_1
        return Ratio(total * float("nan") if bad and os.environ["RANK"] == "1" else total, count)

    def report(self, model, device):
        digest = hashlib.sha256()
        for tensor in model.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        rank = os.environ.get("RANK", "0")
        Path(self.config.run.dir, f"weights-of-rank-{rank}").write_text(digest.hexdigest())
        return {}


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(10)


class OfStream(TinyTask):
    """Its dataset cannot be asked for a sample by number."""

    def train_dataset(self):
        return Stream()


class WithoutEvaluation(TinyTask):
    def eval_dataset(self):
        return None


class Crashing(TinyTask):
    """Raises what nobody expects, in the first attempt only."""

    def loss(self, model, batch):
        ratio = super().loss(model, batch)
        first = len(Path(self.config.run.dir, "attempts.jsonl").read_text().splitlines()) == 1
        if first and self.calls == 15:
            raise KeyError("no such thing")
        return ratio


class WithTorchmetrics(TinyTask):
    """Metrics of every kind of state: sums, moments, and lists of all values. The objects live as
    long as the task, as users write it."""

    class Data(TinyTask.Data):
        eval_size: int = 37
        """Samples to evaluate on."""

    def __init__(self, config):
        super().__init__(config)
        from torchmetrics import MeanSquaredError, PearsonCorrCoef, SpearmanCorrCoef

        self.objects = {
            "mse": MeanSquaredError(),
            "pearson": PearsonCorrCoef(),
            "spearman": SpearmanCorrCoef(),
        }

    def eval_dataset(self):
        return Noisy(self.config.data.eval_size, augment=True)

    def metrics(self):
        return self.objects

    def measure(self, model, batch):
        values = (model(batch["x"])[:, 0], batch["y"][:, 0])
        return {
            "by_hand": Ratio((values[0] - values[1]).square().sum(), len(values[0])),
            **dict.fromkeys(self.objects, values),
        }


class BadMeasure(TinyTask):
    """Forgets the count."""

    def measure(self, model, batch):
        return {"loss": torch.zeros(())}


class StopsOneRank(TinyTask):
    """Rank 1 alone gets a SIGTERM, in its forward pass."""

    class Options(TinyTask.Options):
        stop_rank_1_at: int | None = harmless(None)
        """In which forward pass."""

    def loss(self, model, batch):
        ratio = super().loss(model, batch)
        if self.calls == self.config.task.stop_rank_1_at and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return ratio
