"""Tasks for tests: each has one fault, or one feature that a user's task may have."""

import hashlib
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset

from tests.support.tiny import Noisy, TinyTask
from train import Ratio
from train.data.order import SampleOrder
from train.section import non_semantic


class OneRankNan(TinyTask):
    """At some steps the loss of rank 1, and of no other rank, is NaN. Each rank writes a digest of
    its weights."""

    class Options(TinyTask.Options):
        nan_on_rank_1: list[int] = non_semantic([])
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


class InfiniteLoss(TinyTask):
    """At some steps the loss is infinite, with finite gradients."""

    class Options(TinyTask.Options):
        infinite_at_steps: list[int] = non_semantic([])
        """These steps."""

    def loss(self, model, batch):
        total, count = super().loss(model, batch)
        bad = model.training and self.calls in self.config.task.infinite_at_steps
        return Ratio(total + float("inf") if bad else total, count)


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(10)


class OfStream(TinyTask):
    """Its dataset has no access by index."""

    def train_dataset(self):
        return Stream()


class WithoutEvaluation(TinyTask):
    def eval_dataset(self):
        return None


class Crashing(TinyTask):
    """Raises an unexpected exception, in the first attempt only."""

    def loss(self, model, batch):
        ratio = super().loss(model, batch)
        attempts = Path(self.config.run.dir, "attempts.jsonl")
        if self.calls == 15 and len(attempts.read_text().splitlines()) == 1:
            raise KeyError("no such thing")
        return ratio


class WithTorchmetrics(TinyTask):
    """Metrics with every kind of state: sums, moments, and lists of all values. The task keeps the
    metric objects, as users' tasks do."""

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
    """measure() returns no count."""

    def measure(self, model, batch):
        return {"loss": torch.zeros(())}


class StopsOneRank(TinyTask):
    """Rank 1 sends itself SIGTERM in its forward pass."""

    class Options(TinyTask.Options):
        stop_rank_1_at: int | None = non_semantic(None)
        """The forward pass."""

    def loss(self, model, batch):
        ratio = super().loss(model, batch)
        if self.calls == self.config.task.stop_rank_1_at and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return ratio


class WithBatchNorm(StopsOneRank):
    """Has buffers that change in each step, differently on each rank."""

    def build_model(self):
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))


class FrozenNorm(TinyTask):
    """Keeps the statistics of a BatchNorm, whose scale and shift train."""

    def build_model(self):
        norm = nn.BatchNorm1d(16).eval()
        return nn.Sequential(nn.Linear(8, 16), norm, nn.Linear(16, 4))


class NothingToCount(TinyTask):
    """All targets of the third step are masked."""

    def collate(self, samples):
        batch = super().collate(samples)
        if self.calls == 2:
            batch["mask"] = batch["mask"] * 0
        return batch


class UnusedParameter(TinyTask):
    """The loss does not depend on one of the parameters."""

    def build_model(self):
        model = super().build_model()
        model.register_parameter("idle", nn.Parameter(torch.zeros(3)))
        return model


class DistanceOptimizer(torch.optim.SGD):
    """Keeps state in its parameter groups, as Prodigy and schedule-free optimisers do."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["distance"] = group.get("distance", 0.0) + group["lr"]


class DiesInSave(TinyTask):
    """Rank 1 dies during a save, in the first attempt only."""

    def report(self, model, device):
        from train.checkpoint import saver

        if not self.calls:  # the check before the first step
            return {}

        first = len(Path(self.config.run.dir, "attempts.jsonl").read_text().splitlines()) == 1
        if first and os.environ.get("RANK") == "1":
            saver.hash_file = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        return {}


class BrokenReport(TinyTask):
    """Its report writes to a closed pipe."""

    def report(self, model, device):
        raise BrokenPipeError(32, "Broken pipe")


class StopsInEvaluation(TinyTask):
    """Sends itself SIGTERM during its first evaluation, in the first attempt only."""

    def measure(self, model, batch):
        attempts = Path(self.config.run.dir, "attempts.jsonl")
        if self.calls and len(attempts.read_text().splitlines()) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().measure(model, batch)


class Hangs(TinyTask):
    """One rank hangs in the forward pass of a step, in the first attempt only."""

    class Options(TinyTask.Options):
        hang_at: int = non_semantic(5)
        """The forward pass."""
        hang_rank: str = non_semantic("0")
        """The rank."""

    def loss(self, model, batch):
        ratio = super().loss(model, batch)
        here = os.environ.get("RANK", "0") == self.config.task.hang_rank
        if model.training and here and self.calls == self.config.task.hang_at:
            attempts = Path(self.config.run.dir, "attempts.jsonl").read_text()
            if len(attempts.splitlines()) == 1:
                self.never_ends()
        return ratio

    def never_ends(self):
        while True:
            time.sleep(0.1)


class OneRankIsSlow(TinyTask):
    """Each step of rank 1 takes 0.1 s longer."""

    def loss(self, model, batch):
        if model.training and os.environ.get("RANK") == "1":
            time.sleep(0.1)
        return super().loss(model, batch)


class TooLarge(TinyTask):
    """Its forward pass allocates more memory than any machine has."""

    def loss(self, model, batch):
        torch.empty(2**60)
        return super().loss(model, batch)


class SmallMemory(TinyTask):
    """Its forward pass runs out of memory above a micro-batch size."""

    class Options(TinyTask.Options):
        room: int = non_semantic(3)
        """Samples that fit."""
        room_of_rank_1: int | None = non_semantic(None)
        """The number for rank 1, if it differs."""
        kill_above: int | None = non_semantic(None)
        """Above this size die by SIGKILL instead, as on a host without free memory."""

    def loss(self, model, batch):
        options = self.config.task
        room = options.room
        if os.environ.get("RANK") == "1" and options.room_of_rank_1:
            room = options.room_of_rank_1
        if options.kill_above and len(batch["x"]) > options.kill_above:
            os.kill(os.getpid(), signal.SIGKILL)
        total = super().loss(model, batch)
        if len(batch["x"]) > room:
            raise torch.OutOfMemoryError(f"no room for {len(batch['x'])} samples")
        return total

    def misbehave(self):
        """Not used: trials take steps before there is an attempt."""


class SmallCollate(SmallMemory):
    """Its memory is too small to collate more samples."""

    def collate(self, samples):
        if len(samples) > self.config.task.room:
            raise MemoryError
        return super().collate(samples)


class Hungry(TinyTask):
    """Allocates more memory than any machine has for more than six samples at once."""

    def loss(self, model, batch):
        torch.empty(2**60 if len(batch["x"]) > 6 else 1)
        return super().loss(model, batch)

    def misbehave(self):
        """Not used."""


class Tied(nn.Module):
    """Shares a parameter between two modules, and has a buffer and a frozen parameter."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Linear(8, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.blocks[2].weight = self.blocks[0].weight
        self.out = nn.Linear(width, 4)
        self.out.bias.requires_grad_(False)
        self.register_buffer("scale", torch.empty(4))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x.tanh())
        return self.out(x) * self.scale


class ByModule(TinyTask):
    """Draws its initial weights module by module."""

    def build_model(self):
        return Tied(self.config.model.hidden)

    def init_module(self, module, name):
        if isinstance(module, Tied):
            module.scale.fill_(0.5)
        else:
            nn.init.normal_(module.weight, std=0.3)
            nn.init.uniform_(module.bias)


class ByModuleWithValues(ByModule):
    """build_model assigns values to a tensor that has no storage yet."""

    def build_model(self):
        model = super().build_model()
        model.register_buffer("table", torch.arange(4.0, device="cpu"))
        return model


class ByModuleUnknown(TinyTask):
    """Has a module that init_module does not initialise."""

    def init_module(self, module, name):
        super().init_module(module, name)

    def build_model(self):
        model = super().build_model()
        model.register_parameter("own", nn.Parameter(torch.empty(3)))
        return model


class SharedBlocks(TinyTask):
    """Two of its blocks share a weight; build_model initialises it."""

    def build_model(self):
        model = Tied(self.config.model.hidden)
        model.scale.fill_(0.5)
        return model


class HitOnce(TinyTask):
    """Rank 1 sends itself a signal in a phase of the run, in one attempt only."""

    class Options(TinyTask.Options):
        phase: str = non_semantic("")
        """start-up, step, save, evaluation or loading data."""
        number: int = non_semantic(0)
        """The signal's number."""

    def hit(self, phase):
        options, once = self.config.task, Path(self.config.run.dir, "hit")
        if phase == options.phase and os.environ.get("RANK") == "1" and not once.exists():
            once.write_text(phase)
            os.kill(os.getpid(), options.number)

    def build_model(self):
        self.hit("start-up")
        return super().build_model()

    def collate(self, samples):
        self.batches = getattr(self, "batches", 0) + 1
        if self.batches > 13:
            self.hit("loading data")
        return super().collate(samples)

    def loss(self, model, batch):
        if model.training and self.calls == 12:
            self.hit("step")
            self.hit_in_save()
        return super().loss(model, batch)

    def hit_in_save(self):
        from train.checkpoint import saver

        hash_file = saver.hash_file

        def hit(path):
            self.hit("save")
            return hash_file(path)

        saver.hash_file = hit

    def measure(self, model, batch):
        if self.calls:  # not in the check before the first step
            self.hit("evaluation")
        return super().measure(model, batch)


class SlowToBuild(TinyTask):
    """Takes 2 s to build the model, and writes a file when it starts."""

    def build_model(self):
        Path(self.config.run.dir, "building").touch()
        time.sleep(2)
        return super().build_model()


class BreaksWhenStopped(TinyTask):
    """A SIGTERM that also ends a process on which the step depends."""

    def loss(self, model, batch):
        if self.calls == 10:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
            raise RuntimeError("the compiler died")
        return super().loss(model, batch)


class BreaksEvaluation(TinyTask):
    """Raises in the evaluation after a step, on the last rank."""

    class Options(TinyTask.Options):
        break_at: int = non_semantic(0)
        """The step; 0 for none."""

    def measure(self, model, batch):
        last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        if self.calls and self.calls == self.config.task.break_at * self.micro_batches and last:
            raise ArithmeticError("this metric is broken")
        return super().measure(model, batch)

    @property
    def micro_batches(self):
        """This rank's micro-batches of 6 samples per step."""
        return 2 // int(os.environ["WORLD_SIZE"])


class _Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("this gradient is broken")


class FailsInBackward(TinyTask):
    """Rank 0 fails while it exchanges the sum of the loss with rank 1, which is slower."""

    def loss(self, model, batch):
        loss = super().loss(model, batch)
        if not model.training:
            return loss
        if os.environ["RANK"] == "0":
            return loss._replace(sum=_Failing.apply(loss.sum))
        time.sleep(3)
        return loss


class UsesNothing(TinyTask):
    """Its loss uses no parameter of the model."""

    def loss(self, model, batch):
        return Ratio(torch.zeros((), requires_grad=True) * 1.0, batch["mask"].sum())


class Outliers(Noisy):
    """Some samples have targets that are far too large."""

    def __init__(self, size, outliers):
        super().__init__(size, augment=True)
        self.outliers = outliers

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return sample | {"y": sample["y"] * 100} if index in self.outliers else sample


class Spiky(TinyTask):
    """Some steps have an outlier, on whatever rank and in whatever micro-batch. No sample is taken
    twice."""

    class Data(TinyTask.Data):
        size: int = 1000
        spikes: list[int] = non_semantic([])
        """These steps, if each has 12 samples; the outlier is a different one of them."""

    def train_dataset(self):
        data, order = self.config.data, SampleOrder(self.config.run.seed, self.config.data.size)
        positions = np.array([12 * (step - 1) + step % 12 for step in data.spikes], dtype=np.int64)
        return Outliers(data.size, set(order.keys(positions)[1].tolist()))
