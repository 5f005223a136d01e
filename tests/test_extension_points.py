"""Each extension point accepts a class or function from outside the package, by dotted path."""

import os
import re
import subprocess
import sys

import jsonschema
import pytest
import torch

import train
from tests.support.runs import ROOT, TINY, curve, metrics
from tests.support.tiny import TinyTask
from train.config.schema import config_class
from train.exits import UsageError
from train.hooks import Facts, Hooks
from train.optim.schedule import ScheduleConfig, learning_rate_factor
from train.plugins import Plugin
from train.session import torch_restored
from train.tasks.losses import Loss
from train.tasks.registry import find_task

QUICK = [*TINY, "length.steps=4", "schedule.warmup_steps=2", "track.console=quiet"]


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Writes a new module into the working directory; returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = f"outside_{abs(hash(str(tmp_path)))}"

    def write(text):
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


def fit(tmp_path, *overrides, **options):
    return train.fit(*QUICK, f"run.dir={tmp_path / 'run'}", *overrides, **options)


TASK = """
import torch
from torch import nn
from train import Ratio, Section, Task

class LineTask(Task):
    class Options(Section):
        slope: float = 3.0

    def build_model(self):
        return nn.Linear(1, 1)

    def train_dataset(self):
        x = torch.rand(50, 1)
        return torch.utils.data.TensorDataset(x, self.config.task.slope * x)

    def loss(self, model, batch):
        errors = (model(batch[0]) - batch[1]).square()
        return Ratio(errors.sum(), len(errors))
"""


def test_a_task(tmp_path, outside):
    module = outside(TASK)
    result = fit(tmp_path, f"task.use={module}:LineTask", "task.slope=2.0", "evaluate.at_end=false")
    assert result.step == 4
    with pytest.raises(UsageError, match=f"{module} has no 'LinTask'; did you mean LineTask"):
        fit(tmp_path, f"task.use={module}:LinTask")


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("build_model(self): pass", "build_model() returned None; return a torch.nn.Module."),
        ("loss(self, model, batch): return model(batch[0]).sum()",
         "returned Tensor; return train.Ratio(sum, count), such as Ratio(errors.sum(), len(errors))."),
        ("loss(self, model, batch): return Ratio(model(batch[0]).sum().item(), 12)", "as the sum;"),
        ("loss(self, model, batch): return Ratio(model(batch[0]), 12)",
         "loss() returned a tensor of shape (12, 1) as the sum;"),
        ("loss(self, model, batch): return Ratio(model(batch[0]).sum().detach(), 12)",
         "loss() returned a sum without an autograd graph"),
        ("loss(self, model, batch): return Ratio(model(batch[0]).sum() * 1j, 12)",
         "loss() returned a complex sum (torch.complex64); return a real one"),
        ("loss(self, model, batch): return Ratio(model(batch[0]).sum(), None)",
         "loss() returned None as the count;"),
        ("count(self, batch): return 1.5", "count() returned 1.5; return the whole number of"),
        ("count(self, batch): return -1", "count() returned -1; return the whole number of"),
        ("count(self, batch): return float('nan')", "count() returned nan; return the whole"),
        ("count(self, batch): return 1 << 60", "; return the whole number of"),
        ("loss(self, model, batch): return Ratio(model(batch[0]).sum(), 12.5)",
         "returned a count of 12.5, but its count(batch) returns 12"),
        ("blocks(self, model): return ['layers']", "blocks() returned a list that holds str;"),
        ("facts(self): return {'baseline': 'low'}", "return a dict of numbers by name."),
        ("measure(self, model, batch): return Ratio(1, 2)",
         "measure() returned Ratio; return a dict of Ratios"),
        ("measure(self, model, batch): return {'loss': Ratio(batch[0], 2)}",
         "measure() returned a tensor of shape (12, 1) in the Ratio for 'loss';"),
        ("measure(self, model, batch): return {'loss': 1}", "measure() returned int for 'loss';"),
        ("report(self, model, device): return 'text'", "report() returned str;"),
        ("flops_per_sample(self): return '1e9'", "flops_per_sample() returned str;"),
        ("metrics(self): return ['accuracy']", "metrics() returned list;"),
    ],
)  # fmt: skip
def test_what_a_method_of_a_task_returns_is_checked(tmp_path, outside, method, said):
    module = outside(f"{TASK}\n    eval_dataset = train_dataset\n    def {method}\n")
    with pytest.raises(UsageError) as caught:
        fit(tmp_path, f"task.use={module}:LineTask")
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["Nothing", "Bare"])
def test_a_class_that_is_not_a_whole_task_is_refused_in_one_sentence(tmp_path, name):
    class Nothing(train.Task):
        pass

    class Bare(TinyTask):
        class Model:
            pass

    said = {"Nothing": "implement build_model(), train_dataset(), loss();", "Bare": "Model"}
    with pytest.raises(UsageError, match=re.escape(said[name])):
        fit(tmp_path, task={"Nothing": Nothing, "Bare": Bare}[name])


def test_an_optimiser(tmp_path, outside):
    module = outside(
        "import torch\n"
        "class Half(torch.optim.SGD):\n"
        "    def __init__(self, params, lr, factor=0.5):\n"
        "        super().__init__(params, lr * factor)\n"
    )
    result = fit(tmp_path, f"optim.use={module}:Half", "optim.options.factor=0.25")
    assert result.step == 4
    with pytest.raises(UsageError, match="optim.options.factr is not an argument"):
        fit(tmp_path / "other", f"optim.use={module}:Half", "optim.options.factr=0.25")


SCHEDULE = """
def triangle(step, total_steps, peak=0.5):
    at = step / max(1, total_steps - 1)
    return at / peak if at < peak else (1 - at) / (1 - peak)

class Stairs:
    def __init__(self, height):
        self.height = height
    def __call__(self, step, total_steps):
        return self.height * (step // 2)

calls = []
def impure(step, total_steps):
    calls.append(step)
    return len(calls)

def negative(step, total_steps):
    return -1
"""


def test_a_schedule(tmp_path, outside):
    module = outside(SCHEDULE)
    fit(
        tmp_path,
        f"schedule.use={module}:Stairs",
        "schedule.options={height: 0.5}",
        "schedule.warmup_steps=1",
    )
    rates = list(curve(tmp_path / "run", "train/learning_rate").values())
    assert rates == pytest.approx([0.01, 0.0, 0.005, 0.005]), "warm-up must come first"


def test_a_schedule_is_checked_before_the_first_step(outside):
    module = outside(SCHEDULE)

    def factor(name, total=5, **options):
        return learning_rate_factor(ScheduleConfig(use=f"{module}:{name}", options=options), total)

    assert [factor("triangle", peak=0.25)(step) for step in range(5)] == pytest.approx(
        [0, 1, 2 / 3, 1 / 3, 0]
    )
    with pytest.raises(UsageError, match="compute it from .step, total_steps. alone"):
        factor("impure")
    with pytest.raises(UsageError, match="returned -1.0 at step 0 of 5"):
        factor("negative")
    with pytest.raises(UsageError, match="does not accept schedule.options={'pek': 1}"):
        factor("triangle", pek=1)
    with pytest.raises(UsageError, match="did you mean triangle"):
        factor("triangel")


def load(*overrides):
    return train.load_config(*QUICK, *overrides)


def test_a_misspelt_schedule_names_the_closest_one(tmp_path):
    with pytest.raises(UsageError) as caught:
        load("schedule.use=cosin")
    assert str(caught.value) == (
        "schedule.use must be one of constant, linear, cosine, cosine_restarts, wsd, step, "
        "module.path:function, but is 'cosin' (from command line); did you mean cosine?"
    )
    with pytest.raises(UsageError, match="but schedule.use=cosine takes none"):
        load("schedule.options.a=1")


LOSS = """
from torch.nn import functional as F

def smooth(logits, targets):
    return F.cross_entropy(logits, targets, label_smoothing=0.1, reduction="none")

def plain(logits, targets):
    return F.cross_entropy(logits, targets, reduction="sum")

def mean(logits, targets):
    return F.cross_entropy(logits, targets)

def of_each_class(logits, targets):
    return logits
"""
DIGITS = ["task.use=digits", "model.channels=2", "batch.global_batch_size=16", "length.steps=2"]


def test_a_loss(tmp_path, outside):
    module = outside(LOSS)
    losses = {}
    for name in ("cross_entropy", f"{module}:smooth"):
        where = tmp_path / name.replace(":", "-")
        train.fit(*DIGITS, "track.tensorboard=false", "track.wandb=disabled", "track.console=quiet",
                  f"run.dir={where}", f"task.loss={name}")  # fmt: skip
        losses[name.rpartition(":")[2]] = [row["train/loss"] for row in metrics(where)]
    assert losses["smooth"] != losses["cross_entropy"]


def test_a_loss_is_a_sum_or_one_value_per_unit_and_excludes_padding(outside):
    module = outside(LOSS)
    logits, targets = torch.randn(6, 3), torch.tensor([0, 1, 2, -100, 0, -100])
    expected = Loss("cross_entropy").sum(logits, targets)
    assert Loss(f"{module}:plain").sum(logits, targets) == pytest.approx(expected.item())
    assert Loss(f"{module}:smooth").sum(logits, targets).shape == ()
    with pytest.raises(UsageError, match="returned a scalar that is not the sum over the units"):
        Loss(f"{module}:mean").sum(logits, targets)
    with pytest.raises(UsageError, match=r"returned \(4, 3\) for logits \(4, 3\)"):
        Loss(f"{module}:of_each_class").sum(logits, targets)
    with pytest.raises(UsageError, match="task.loss must be one of cross_entropy, .*did you mean"):
        load(*DIGITS, "task.loss=cross_entrop")


def test_the_text_task_reports_the_cross_entropy_in_bits_with_any_loss(outside):
    module = outside(LOSS)
    from train.tasks.text.task import TextTask

    def measured(loss):
        loaded = train.load_config(
            "task.use=text", f"task.loss={loss}", "batch.global_batch_size=4", "length.steps=1"
        )
        task = TextTask(loaded.config)
        tokens = torch.arange(6).reshape(2, 3)
        targets = torch.tensor([[1, 2, -100], [4, 5, 6]])
        batch = {"tokens": tokens, "targets": targets, "bytes": torch.tensor([2, 3])}
        table = torch.randn(9, 9, generator=torch.Generator().manual_seed(1))
        return task, task.measure(lambda tokens: table[tokens], batch)

    _, plain = measured("cross_entropy")
    task, smooth = measured(f"{module}:smooth")
    assert smooth["cross_entropy"].sum == plain["loss"].sum != smooth["loss"].sum
    assert smooth["bits_per_byte"].sum == plain["bits_per_byte"].sum
    totals = {
        name: train.Ratio(float(ratio.sum), float(ratio.count)) for name, ratio in smooth.items()
    }
    nats, count = totals["cross_entropy"]
    assert task.derive(totals)["perplexity"] == pytest.approx(
        torch.tensor(nats / count).exp().item()
    )


SINK = """
from train import Sink

class Lines(Sink):
    def __init__(self, run, name="lines.txt"):
        super().__init__(run)
        self.path = run.directory / name

    def log(self, step, metrics):
        with self.path.open("a") as file:
            file.write(f"{step} {sorted(metrics)}\\n")

class Broken(Sink):
    def __init__(self, run):
        raise OSError("no connection")
"""


def test_a_sink(tmp_path, outside):
    module = outside(SINK)
    fit(tmp_path, f"track.sinks=[{{use: '{module}:Lines', options: {{name: mine.txt}}}}]")
    lines = (tmp_path / "run" / "mine.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "4", "4"]
    assert "train/loss" in lines[0]


def test_a_sink_is_checked_before_the_first_step(tmp_path, outside):
    module = outside(SINK)
    with pytest.raises(
        UsageError, match=r"track.sinks \(command line\) names .*did you mean Lines"
    ):
        fit(tmp_path, f"track.sinks=[{module}:Line]")
    with pytest.raises(
        UsageError, match="does not accept the options {'file': 1} .* it takes name"
    ):
        fit(tmp_path, f"track.sinks=[{{use: '{module}:Lines', options: {{file: 1}}}}]")
    with pytest.raises(UsageError, match=f"names '{module}:LineTask'|has no 'LineTask'"):
        fit(tmp_path, f"track.sinks=[{module}:LineTask]")
    with pytest.raises(UsageError, match="whose constructor failed .OSError: no connection"):
        fit(tmp_path, f"track.sinks=[{module}:Broken]")


HOOK = """
import json
import random
import numpy as np
import torch
from train import Hook

class Diary(Hook):
    def __init__(self, name="diary.txt"):
        self.name = name

    def write(self, facts, what, value=""):
        with (facts.directory / self.name).open("a") as file:
            file.write(f"{what} {facts.step} {value}\\n")

    def on_run_start(self, facts):
        self.write(facts, "start", facts.total_steps)

    def on_step_end(self, facts):
        self.write(facts, "step", "train/loss" in facts.metrics)
        if facts.step == 2 and facts.config["run"]["name"] == "stopping":
            (facts.directory / "stop").touch()

    def on_evaluation(self, facts):
        self.write(facts, "evaluation", "eval/loss" in facts.metrics)

    def on_checkpoint(self, facts):
        self.write(facts, "checkpoint", facts.checkpoint.name[-2:])

    def on_run_end(self, facts):
        self.write(facts, "end", int(facts.exit))

class Random(Hook):
    def on_step_end(self, facts):
        torch.rand(3), np.random.rand(), random.random()

class Careless(Hook):
    def __init__(self, change):
        self.change = change

    def on_step_end(self, facts):
        eval(self.change, {"torch": torch})

class Curious(Hook):
    def on_step_end(self, facts):
        facts.config["optim"]["lr"] = 1.0

class Everywhere(Diary):
    every_rank = True

class Misspelt(Hook):
    def on_step_ends(self, facts):
        pass
"""


def test_a_hook_is_called_at_each_point(tmp_path, outside):
    module = outside(HOOK)
    rules = ["evaluate.every_steps=2", "checkpoint.every_steps=2", "checkpoint.asynchronous=false"]
    fit(tmp_path, *rules, f"hooks=[{{use: '{module}:Diary', options: {{name: mine.txt}}}}]")
    assert (tmp_path / "run" / "mine.txt").read_text().splitlines() == [
        "start 0 4", "step 1 True", "step 2 True", "evaluation 2 True", "checkpoint 2 02",
        "step 3 True",
        "step 4 True", "evaluation 4 True", "checkpoint 4 04", "end 4 0",
    ]  # fmt: skip


def test_a_hook_is_called_for_every_checkpoint_that_is_written_asynchronously(tmp_path, outside):
    module = outside(HOOK)
    fit(tmp_path, "checkpoint.every_steps=1", "checkpoint.keep_last=9", f"hooks=[{module}:Diary]")
    lines = (tmp_path / "run" / "diary.txt").read_text().splitlines()
    told = [line.split()[2] for line in lines if line.startswith("checkpoint")]
    assert told == ["01", "02", "03", "04"]


def test_a_hook_that_draws_random_numbers_is_named_and_does_not_change_the_run(
    tmp_path, outside, capfd
):
    module = outside(HOOK)
    fit(tmp_path / "with", f"hooks=[{module}:Random]", "model.dropout=0.5")
    fit(tmp_path / "without", "model.dropout=0.5")
    assert curve(tmp_path / "with" / "run") == curve(tmp_path / "without" / "run")
    warnings = [line for line in capfd.readouterr().err.splitlines() if "random numbers" in line]
    assert len(warnings) == 1
    assert f"{module}:Random' drew random numbers" in warnings[0]


def facts(tmp_path, rank=0):
    return Facts("id", "name", tmp_path, {"optim": {"lr": 0.1}}, rank, 2, 10)


def hooks(tmp_path, name, rank=0, **options):
    return Hooks([Plugin(use=name, options=options)], facts(tmp_path, rank))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("torch.set_grad_enabled(False)", "gradient mode"),
        ("torch.set_float32_matmul_precision('medium')", "float32 matmul precision"),
        ("setattr(torch.backends.cudnn, 'benchmark', True)", "cudnn.benchmark"),
        ("setattr(torch.backends.cudnn, 'allow_tf32', False)", "cudnn.allow_tf32"),
        ("setattr(torch.backends.mkldnn.conv, 'fp32_precision', 'bf16')", "mkldnn.conv"),
        ("torch.set_default_device('meta')", "default device"),
        (
            "torch.use_deterministic_algorithms(True, warn_only=True)",
            "deterministic algorithms",
        ),
    ],
)
def test_a_hook_that_changes_a_setting_of_torch_ends_the_run(tmp_path, outside, change, named):
    careless = hooks(tmp_path, f"{outside(HOOK)}:Careless", change=change)
    with torch_restored():
        torch.use_deterministic_algorithms(True)
        with pytest.raises(
            UsageError, match=rf"Careless' changed a setting of torch in on_step_end \({named}"
        ):
            careless.step_end(1, 12)


def test_a_hook_that_changes_its_facts_ends_the_run(tmp_path, outside):
    with pytest.raises(
        train.RunError, match=r"Curious' failed in on_step_end at step 1 \(TypeError"
    ) as caught:
        hooks(tmp_path, f"{outside(HOOK)}:Curious").step_end(1, 12)
    assert caught.value.code == 70


FAILING = """
import train
from train.exits import DataError

class Failing(LineTask):
    def loss(self, model, batch):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == self.config.task.slope:
            raise DataError("The batch is empty.")
        return super().loss(model, batch)

class Last(train.Hook):
    def on_run_end(self, facts):
        (facts.directory / "ends").write_text(f"{int(facts.exit)} {facts.error}")

    def on_failure(self, facts):
        (facts.directory / "fails").write_text(f"{facts.step} {int(facts.exit)} {facts.error}")
        raise SystemExit(0)

class Codes(train.Sink):
    def fail(self, code):
        (self.run.directory / "code").write_text(str(code))
"""


def test_hooks_and_sinks_are_called_when_the_run_fails(tmp_path, outside, capfd):
    module = outside(TASK + FAILING)
    names = [f"hooks=[{module}:Last]", f"track.sinks=[{module}:Codes]", "evaluate.at_end=false"]
    with pytest.raises(train.RunError, match="The batch is empty."):
        fit(tmp_path, f"task.use={module}:Failing", "task.slope=3.0", *names)
    run = tmp_path / "run"
    assert (run / "fails").read_text() == "2 65 The batch is empty."
    assert (run / "code").read_text() == "65"
    assert "failed in on_failure (SystemExit: 0)" in capfd.readouterr().err
    assert not (run / "ends").exists()
    fit(tmp_path, f"task.use={module}:LineTask", "task.slope=3.0", *names, allow_changes=True)
    assert (run / "ends").read_text() == "0 None"


ODD = """
import train

class Panic(BaseException):
    pass

class Odd(train.Hook):
    def __init__(self, kind, at):
        self.error, self.at = {"panic": Panic, "leave": GeneratorExit}[kind], at
        self.fail("constructor")

    def fail(self, at):
        if self.at == at:
            raise self.error("oddly")

    def on_run_start(self, facts):
        self.fail("start")

    def on_failure(self, facts):
        self.fail("failure")
"""


@pytest.mark.parametrize("kind", ["panic", "leave"])
def test_a_hook_that_raises_no_exception_is_named(tmp_path, outside, kind):
    warnings = []

    def hooks(at):
        plugin = Plugin(use=f"{outside(ODD)}:Odd", options={"kind": kind, "at": at})
        facts = Facts("a", "a", tmp_path, {}, rank=0, world_size=1, total_steps=2)
        return Hooks([plugin], facts, warn=warnings.append)

    for at in ("constructor", "start"):
        with pytest.raises(train.RunError, match=f"Odd' failed in .*{at}.*oddly") as caught:
            hooks(at).run_start(0, 0)
        assert caught.value.code == 70
    hooks("failure").failure(train.Exit.DATA, "The sample is damaged.")
    assert "oddly" in warnings[0]


STOPPED = """
import train

class Stopping(train.Hook):
    def on_step_end(self, facts):
        if facts.step == 2:
            (facts.directory / "stop").touch()

class Ends(train.Sink):
    def __init__(self, run):
        super().__init__(run)
        self.file = run.directory / "ends"

    def open(self):
        rows = [(row.step, row.attempt, "train/loss" in row.metrics) for row in self.run.rows()]
        print(self.run.attempt, rows, self.run.parameters()["length.steps"], file=self.file.open("a"))

    def end(self, code):
        print("ends with", code, file=self.file.open("a"))
"""


def test_a_sink_learns_what_is_committed_and_how_the_attempt_ends(tmp_path, outside):
    module = outside(STOPPED)
    options = ["length.steps=100", f"track.sinks=[{module}:Ends]", "track.log_every_steps=1"]
    fit(tmp_path, *options, "task.sleep=0.03", f"hooks=[{module}:Stopping]")
    stopped = len(metrics(tmp_path / "run"))
    assert 2 <= stopped < 100
    fit(tmp_path, *options, "hooks=[]")
    assert (tmp_path / "run" / "ends").read_text().splitlines() == [
        "1 [] 100",
        "ends with 143",
        f"2 {[(step, 1, True) for step in range(1, stopped + 1)]} 100",
        "ends with 0",
    ]


REFUSING = """
import errno
from train import Exit, Hook, RunError, Sink

class BudgetError(RunError):
    code = Exit.NOT_FINITE
    def __init__(self, spent, limit):
        super().__init__(f"{spent} of {limit} spent")

class Retrying(Hook):
    def on_step_end(self, facts):
        error = RunError("The licence server is busy.")
        error.code = Exit.RETRY
        raise error

class Budget(Hook):
    def on_step_end(self, facts):
        raise BudgetError(3, limit=2)

class DiskFull(Hook):
    def on_step_end(self, facts):
        raise OSError(errno.ENOSPC, "No space left on device")

class Constructed(Sink):
    def __init__(self, run):
        raise BudgetError(3, limit=2)

class Stairs:
    def __init__(self):
        raise BudgetError(3, limit=2)
"""


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("Retrying", 75, "Retrying' in on_step_end at step 1: The licence server is busy."),
        ("Budget", 78, "Budget' in on_step_end at step 1: 3 of 2 spent"),
        ("DiskFull", 75, "DiskFull' in on_step_end at step 1: [Errno 28] No space left on device"),
    ],
)
def test_the_error_of_a_hook_keeps_its_exit_code(tmp_path, outside, name, code, said):
    module = outside(REFUSING)
    with pytest.raises(train.RunError) as caught:
        hooks(tmp_path, f"{module}:{name}").step_end(1, 12)
    assert caught.value.code == code
    assert said in str(caught.value)


def test_the_errors_of_a_sink_and_a_schedule_keep_their_exit_code(tmp_path, outside):
    module = outside(REFUSING)
    for override in (f"track.sinks=[{module}:Constructed]", f"schedule.use={module}:Stairs"):
        with pytest.raises(train.RunError, match=f"{module}:.*: 3 of 2 spent") as caught:
            fit(tmp_path, override)
        assert caught.value.code == 78


def test_other_ranks_call_only_collective_hooks(tmp_path, outside):
    module = outside(HOOK)
    hooks(tmp_path, f"{module}:Diary", rank=1).run_start(0, 0)
    assert not (tmp_path / "diary.txt").exists()
    hooks(tmp_path, f"{module}:Everywhere", rank=1).run_start(0, 0)
    assert (tmp_path / "diary.txt").read_text() == "start 0 10\n"


def test_a_hook_is_checked_before_the_run_starts(tmp_path, outside):
    module = outside(HOOK)
    with pytest.raises(UsageError, match=r"hooks \(command line\) names .*did you mean Diary"):
        fit(tmp_path, f"hooks=[{module}:Diry]")
    with pytest.raises(UsageError, match="not a subclass of train.hooks.Hook"):
        fit(tmp_path, f"hooks=[{module}:random]", f"hooks=[{module}:json]", "hooks=[builtins:dict]")
    with pytest.raises(UsageError, match="does not accept the options"):
        fit(tmp_path, f"hooks=[{{use: '{module}:Diary', options: {{nam: x}}}}]")
    with pytest.raises(
        UsageError, match="whose on_step_ends is not a method .*; did you mean on_step_end?"
    ):
        fit(tmp_path, f"hooks=[{module}:Misspelt]")
    with pytest.raises(UsageError, match="hooks.0.usee is not a known key"):
        fit(tmp_path, f"hooks=[{{usee: '{module}:Diary'}}]")
    assert not (tmp_path / "run").exists()


def test_a_hook_that_changes_the_working_directory_does_not_divide_the_run(
    tmp_path, outside, capfd
):
    module = outside(
        f"{TASK}\nimport os, train\n"
        "class Away(train.Hook):\n"
        "    def on_run_start(self, facts):\n"
        "        os.mkdir('away')\n"
        "        os.chdir('away')\n"
    )
    overrides = [f"task.use={module}:LineTask", f"hooks=[{module}:Away]", "track.console=plain"]
    result = train.fit(*QUICK, *overrides, "evaluate.at_end=false", "run.name=mine")
    assert [checkpoint.step for checkpoint in result.run.checkpoints] == [4]
    assert result.run.finished["step"] == len(result.run.metrics["train/loss"].steps) == 4
    assert result.directory == tmp_path / "runs" / "mine"
    assert not (tmp_path / "away" / "runs").exists()
    assert " in runs/mine\n" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("override", "said"),
    [("schedule.use=nosuch:function", "nosuch"), ("hooks=[{module}:Broken]", "no such diary")],
)
def test_what_is_refused_leaves_the_run_as_it_was(tmp_path, outside, override, said):
    module = outside(
        f"{HOOK}\nclass Broken(Hook):\n    def __init__(self):\n        open('no such diary')\n"
    )
    before = fit(tmp_path)
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(train.RunError, match=said):
        fit(tmp_path, "length.steps=5", override.format(module=module), allow_changes=True)
    for name in ("config.json", "attempts.jsonl", "finished.json", "ledger.bin", "metrics.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == files[tmp_path / "run" / name], name
    assert fit(tmp_path) == before


@pytest.mark.parametrize(
    ("values", "valid"),
    [
        ({"schedule": {"use": "cosine"}, "hooks": ["mine:Hook"]}, True),
        ({"schedule": {"use": "mine:f"}, "track": {"sinks": [{"use": "mine:Sink"}]}}, True),
        ({"task": {"use": "text", "loss": "mine:f"}}, True),
        ({"schedule": {"use": "cosin"}}, False),
        ({"hooks": [{"name": "mine:Hook"}]}, False),
        ({"task": {"use": "text", "loss": "mean"}}, False),
    ],
)
def test_the_json_schema_accepts_both_forms(values, valid):
    required = {
        "task": {"use": "text"}, "batch": {"global_batch_size": 1}, "length": {"steps": 1}
    }  # fmt: skip
    schema = config_class(find_task("text", "test")).model_json_schema()
    problems = list(jsonschema.Draft202012Validator(schema).iter_errors(required | values))
    assert (not problems) == valid, problems


ENTRY_POINTS = """
[torchx.schedulers]
outside = outside_scheduler:create_scheduler

[torchx.named_resources]
big_outside = outside_scheduler:big
"""
SCHEDULER = """
from torchx.schedulers.local_scheduler import LocalScheduler
from torchx.specs import Resource

def create_scheduler(session_name, **kwargs):
    return LocalScheduler(session_name, image_provider_class=None)

def big():
    return Resource(cpu=77, gpu=0, memMB=1024)
"""
LOOK = """
from torchx.schedulers import get_scheduler_factories
from torchx.specs import resource
print("outside" in get_scheduler_factories(), "slurm" in get_scheduler_factories())
print(resource(h="big_outside").cpu)
"""


def test_a_scheduler_and_a_named_resource_of_torchx(tmp_path):
    """Registered by the entry points of another installed distribution."""
    info = tmp_path / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "outside_scheduler.py").write_text(SCHEDULER)
    done = subprocess.run(
        [sys.executable, "-c", LOOK], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )  # fmt: skip
    assert done.stdout.split() == ["True", "True", "77"], done.stderr
