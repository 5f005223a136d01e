"""The same training in PyTorch, isorun, Accelerate, Hugging Face Trainer and Lightning.

Hand-written loops on several ranks are in :mod:`benchmarks.raw_loops`.
"""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from torch import nn
    from torch.optim import Optimizer

    from benchmarks.workload import Size, Workload

CLIP = 1.0


def bare(work: Workload) -> None:
    """A plain PyTorch loop."""
    model = work.model()
    if work.size.compile:
        model.compile()
    take_steps(work, model, work.optimizer(model))


def take_steps(work: Workload, model: nn.Module, optimizer: Optimizer) -> None:
    """The plain PyTorch loop: forward, backward, clip, step."""
    from torch.nn.utils import clip_grad_norm_

    rate = work.loaded.config.optim.lr
    for step, batch in enumerate(work.loader()):
        for group in optimizer.param_groups:
            group["lr"] = rate * work.factor(step)
        loss = work.loss(model, batch)
        loss.backward()
        clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()


def isorun(work: Workload, *overrides: str) -> None:
    """``train.loop.fit.fit`` as ``python -m train fit`` calls it, with all tracking."""
    from benchmarks.workload import EnoughError
    from train.checkpoint.run_directory import RunDirectory
    from train.exits import DataError
    from train.loop.fit import fit
    from train.loop.open_run import open_run
    from train.process.stop import StopRequest

    work.overrides += overrides
    directory = RunDirectory(work.loaded.run_directory)
    if work.world_size == 1:
        directory.acquire()
    stop = StopRequest(work.loaded.config.stop)
    try:
        with open_run(work.loaded, directory, [], stop) as run:
            fit(run)
    except DataError as error:  # names the samples at which collate stopped the training
        if not isinstance(error.__cause__, EnoughError):
            raise


def isorun_without_sinks(work: Workload, *overrides: str) -> None:
    """isorun without TensorBoard and W&B: console and metrics.jsonl only."""
    isorun(work, "track.tensorboard=false", "track.wandb=disabled", *overrides)


def accelerate(work: Workload) -> None:
    """The loop of Accelerate's documentation."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = work.model()
    model, optimizer, loader = accelerator.prepare(model, work.optimizer(model), work.loader())
    rate = work.loaded.config.optim.lr
    for step, batch in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = rate * work.factor(step)
        loss = work.loss(model, batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()


def trainer(work: Workload) -> None:
    """Hugging Face Trainer; logs every 10 steps, without sinks and progress bar."""
    from torch import nn
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import Trainer, TrainingArguments

    class WithLoss(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, **batch: Any) -> dict[str, Any]:
            return {"loss": work.loss(self.model, batch)}

    class OwnData(Trainer):
        def get_train_dataloader(self) -> Any:
            return self.accelerator.prepare(work.loader())

    model = WithLoss(work.model())
    optimizer = work.optimizer(model)
    arguments = TrainingArguments(
        output_dir=str(work.directory),
        per_device_train_batch_size=work.size.batch,
        max_steps=work.steps,
        max_grad_norm=CLIP,
        logging_steps=10,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    OwnData(
        model,
        arguments,
        train_dataset=work.dataset,
        optimizers=(optimizer, LambdaLR(optimizer, work.factor)),
    ).train()


def lightning(work: Workload) -> None:
    """Lightning's Trainer; logs the loss every 10 steps, without sinks and progress bar."""
    import lightning
    from torch.optim.lr_scheduler import LambdaLR

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = work.model()

        def training_step(self, batch: Any, _index: int) -> Any:
            loss = work.loss(self.model, batch)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = work.optimizer(self)
            schedule = LambdaLR(optimizer, work.factor)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=work.steps,
        gradient_clip_val=CLIP,
        log_every_n_steps=10,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(work.directory),
    ).fit(Module(), work.loader())


Train = Callable[["Workload"], None]

CONTENDERS: dict[str, Train] = {
    "bare PyTorch": bare,
    "isorun": isorun,
    "isorun, no sinks": isorun_without_sinks,
    "Accelerate": accelerate,
    "HF Trainer": trainer,
    "Lightning": lightning,
}


class Trained(NamedTuple):
    """The result of a rank after all turns."""

    losses: list[float]
    """Mean loss over this rank's samples, per step."""
    first_peak: int
    """Peak GPU memory before the first turn, in bytes."""
    peak: int
    """Peak GPU memory from the first turn on, in bytes."""


def serve(train: Train, sizes: list[Size], pipe: Connection, directory: Path) -> None:
    """The process of a rank: for each size runs one turn per message True, until a False.

    Sends the seconds per step of each turn (the first value only means "ready"), then Trained; or
    the traceback of an error.
    """
    with Path(os.devnull).open("w") as sink:
        os.dup2(sink.fileno(), 1)
    warnings.filterwarnings("ignore")
    with suppress(EOFError, BrokenPipeError):  # the parent process has ended
        try:
            for number, size in enumerate(sizes):
                pipe.recv()
                pipe.send(train_in_turns(train, size, pipe, directory / str(number)))
        except (EOFError, BrokenPipeError):
            raise
        except BaseException:
            pipe.send(traceback.format_exc())


def train_in_turns(train: Train, size: Size, pipe: Connection, directory: Path) -> Trained:
    """Runs one training, which pauses at the end of each turn."""
    import torch

    from benchmarks.workload import EnoughError, Workload

    def turn_over(seconds: float) -> None:
        try:
            pipe.send(seconds)
            proceed = pipe.recv()
        except (EOFError, BrokenPipeError):
            proceed = False
        if not proceed:
            raise EnoughError

    torch.set_num_threads(size.threads)
    work = Workload(size, directory, turn_over)
    with suppress(EnoughError):
        train(work)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return Trained(work.losses(), work.stopwatch.first_peak, peak)
