"""Compute a step of a run again and compare it with what the run has logged and saved.

Starts from the newest checkpoint before the step, on this placement or on another. The exit code is
0 if loss, gradient norm and, where the step has a checkpoint, all weights are the same within the
tolerance, else 65. The run directory is only read.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checkpoint.damage import DamagedError, refused_files
from train.checkpoint.manifest import Manifest
from train.checkpoint.run_directory import RunDirectory
from train.checkpoint.store import CheckpointStore
from train.command_line import say
from train.commands.checkpoints import find_checkpoint
from train.commands.placements import Placement, parse, result_of
from train.config.changes import differences, listed
from train.config.load import LoadedConfig, load_config
from train.data.ledger import attempt_starts, gone_back_from
from train.exits import Exit, ResumeRefusedError, UsageError, first_line, sys_exit_refused
from train.json_files import is_count
from train.json_text import json_text
from train.paths import path_argument

if TYPE_CHECKING:
    from train.data.fetch import MicroBatch

_NUMBERS = {"loss", "grad_norm", "logged", "replayed", "difference"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("path", metavar="RUN", help="the directory of a run")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="values that do not change results, such as strategy=ddp",
    )
    parser.add_argument("--step", type=int, required=True, help="the last step to compute again")
    parser.add_argument(
        "--on",
        metavar="PLACEMENT",
        help="PROCESSES or PROCESSES:STRATEGY of this machine, such as 2:fsdp2; default: this "
        "process, or those of the launcher",
    )
    parser.add_argument(
        "--from",
        type=int,
        dest="first",
        metavar="STEP",
        help="with --anomaly: look at the modules from this step on; default: the last step",
    )
    parser.add_argument(
        "--attempt",
        type=int,
        metavar="N",
        help="the step as this attempt took it, such as a spike that the run has gone back from; "
        "default: the newest attempt that took it",
    )
    parser.add_argument(
        "--anomaly",
        action="store_true",
        help="name the first module whose output is not finite",
    )
    parser.add_argument(
        "--batch", type=path_argument, metavar="FILE",
        help="save the samples of the step with torch.save",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, metavar="REL", help="default: 1e-4"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")


@sys_exit_refused()
def run(arguments: argparse.Namespace) -> Exit:
    """Prints the comparison, on rank 0."""
    _check(arguments)
    loaded = load_config([arguments.path], arguments.overrides, runs=False)
    directory = RunDirectory(loaded.run_directory)
    with refused_files(loaded.run_directory):
        logged = _logged(directory, arguments.attempt)
        spike = gone_back_from(directory.ledger, arguments.attempt)
    start = _start(loaded, arguments, max([*logged["train/loss"], spike or 0]))
    if arguments.on:
        result: dict[str, Any] | None = _elsewhere(arguments, parse(arguments.on))
    else:
        result = _here(loaded, start, logged, arguments)
    if result is None:  # another rank prints it
        return Exit.DONE
    if arguments.json:
        say(json_text(result))
    else:
        _print(result)
    return Exit.DONE if result["same"] else Exit.DATA


def _check(arguments: argparse.Namespace) -> None:
    """Raises UsageError for options that contradict each other."""
    step, first, tolerance = arguments.step, arguments.first, arguments.tolerance
    if not tolerance >= 0:
        raise UsageError(f"--tolerance is {tolerance:g}; use a number from 0.")
    if first is not None and not arguments.anomaly:
        raise UsageError("--from says where --anomaly begins; add --anomaly, or remove --from.")
    if first is not None and not 0 < first <= step:
        raise UsageError(f"--from is {first}; name a step from 1 to {step}, which is --step.")


def _start(loaded: LoadedConfig, arguments: argparse.Namespace, last_known: int) -> Path | None:
    """The newest checkpoint before the step; None for the start of the run. ``last_known``: the
    last step that the attempt is known to have taken."""
    step, directory = arguments.step, RunDirectory(loaded.run_directory)
    changes = differences(loaded.config, directory.stored_config() or {})
    if changed := [change for change in changes if change.changes_results]:
        raise ResumeRefusedError(
            "These values are not those of the run, so that its steps would be others:\n"
            f"{listed(changed, loaded.composed)}\nRemove them."
        )
    with refused_files(directory.path):
        store = CheckpointStore(directory.checkpoints)
        steps = [s for s in store.steps() if _is_known(store, s, arguments.attempt)]
        starts = attempt_starts(directory.ledger)
    if arguments.attempt is not None:
        _check_attempt(arguments, starts, loaded.run_directory_as_set)
    newest = max([*steps, last_known])
    if not 0 < step <= newest:
        raise UsageError(
            f"--step is {step}, but {loaded.run_directory_as_set} has steps 1 to {newest}; name "
            "one of them."
        )
    before = [s for s in steps if s < step]
    if before:
        return find_checkpoint(loaded, str(before[-1]))
    if loaded.config.init_from:
        oldest = f"; the oldest checkpoint is that of step {steps[0]}" if steps else ""
        raise UsageError(
            f"--step is {step}, and no checkpoint is before it{oldest}, but a run with init_from "
            "does not start from what its config alone says; name a later step."
        )
    return None


def _check_attempt(arguments: argparse.Namespace, starts: Mapping[int, int], run: object) -> None:
    """Raises UsageError for an attempt that has not taken the step. ``starts``: the step that each
    attempt resumed from."""
    number, step = arguments.attempt, arguments.step
    if number not in starts:
        raise UsageError(
            f"--attempt is {number}, but {run} has attempts 1 to {max(starts, default=0)}; name "
            "one of them."
        )
    if step <= starts[number]:
        raise UsageError(
            f"--step is {step}, but attempt {number} went on after step {starts[number]}; name an "
            "earlier attempt."
        )


def _is_known(store: CheckpointStore, step: int, attempt: int | None) -> bool:
    """Whether an attempt knows of the checkpoint of a step, which a later one may have written."""
    if attempt is None:
        return True
    try:
        return (Manifest.read(store.path(step)).state.get("attempt") or 0) <= attempt
    except DamagedError:
        return False


def _logged(directory: RunDirectory, attempt: int | None) -> dict[str, dict[int, float]]:
    from train.diagnosis.replay import NAMES
    from train.parity.compare import curve

    if not directory.metrics.exists():
        return {name: {} for name in NAMES}
    return {name: curve(directory.path, name, attempt) for name in NAMES}


def _here(
    loaded: LoadedConfig,
    start: Path | None,
    logged: Mapping[str, Mapping[int, float]],
    arguments: argparse.Namespace,
) -> dict[str, Any] | None:
    from train.diagnosis.bench import open_bench
    from train.diagnosis.replay import differing_tensors, replay

    directory, step = RunDirectory(loaded.run_directory), arguments.step
    recorded = directory.attempts.last()
    size = recorded.get("micro_batch_size")
    of_run = size if is_count(size) and size else None
    watch = (arguments.first or step) if arguments.anomaly else None
    with open_bench(loaded, start, of_run, arguments.attempt) as bench:
        found = replay(bench, step, logged, watch=watch)
        store = CheckpointStore(directory.checkpoints)
        is_saved = step in store.steps() and _is_known(store, step, arguments.attempt)
        saved = store.path(step) if is_saved else None
        tensors = differing_tensors(bench, saved, arguments.tolerance) if saved else []
        if arguments.batch and bench.engine.is_main:
            _save(found.micro_batches, arguments.batch)
        if not bench.engine.is_main:
            return None
        first, own_size = bench.progress.step, bench.plan.largest_micro_batch
    differing = [c for c in found.compared if not c.difference <= arguments.tolerance]
    taken = found.taken
    return {
        "step": step,
        "from": first,
        "loss": taken.loss,
        "grad_norm": taken.grad_norm,
        "finite": taken.is_finite,
        "skipped": taken.skipped,
        "compared": [
            {"step": c.step, "name": c.name, "logged": c.logged, "replayed": c.replayed}
            | {"difference": c.difference}
            for c in found.compared
        ],
        "weights": None if saved is None else [tensor._asdict() for tensor in tensors],
        "not_finite": {str(s): output.origin for s, output in found.outputs.items()},
        "micro_batch_size": {"run": of_run, "replay": own_size},
        "batch": str(arguments.batch) if arguments.batch else None,
        "same": not differing and not tensors,
        "tolerance": arguments.tolerance,
    }


def _save(of_step: Sequence[MicroBatch], path: Path) -> None:
    import torch

    micro_batches = [{"indices": micro.indices.tolist(), "batch": micro.batch} for micro in of_step]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(micro_batches, path)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"--batch is {str(path)!r}, which cannot be written ({first_line(error)}); name "
            "another file."
        ) from error


def _elsewhere(arguments: argparse.Namespace, placement: Placement) -> dict[str, Any]:
    words = [arguments.path, *arguments.overrides, f"strategy={placement.strategy}"]
    words += [f"--step={arguments.step}", f"--tolerance={arguments.tolerance}", "--json"]
    words += [f"--batch={arguments.batch}"] if arguments.batch else []
    words += ["--anomaly"] if arguments.anomaly else []
    words += [f"--attempt={arguments.attempt}"] if arguments.attempt is not None else []
    words += [f"--from={arguments.first}"] if arguments.first else []
    line = result_of(placement, "replay", *words, start='{"step"')
    result: dict[str, Any] = json.loads(line, object_hook=_with_nan)
    return result


def _with_nan(values: dict[str, Any]) -> dict[str, Any]:
    """The numbers that are null in JSON because they are not finite."""
    return {n: math.nan if v is None and n in _NUMBERS else v for n, v in values.items()}


def _print(result: dict[str, Any]) -> None:
    step, first = result["step"], result["from"]
    where = f"the checkpoint of step {first}" if first else "the start of the run"
    say(f"steps {first + 1} to {step}, from {where}")
    say(f"{'step':>8}  {'':<22}{'logged':>16}{'replayed':>16}{'difference':>12}")
    shown = result["compared"][-20:]
    for row in shown:
        say(
            f"{row['step']:>8}  {row['name']:<22}{row['logged']:>16.8g}{row['replayed']:>16.8g}"
            f"{row['difference']:>12.1e}"
        )
    if not any(row["step"] == step for row in shown):
        say(f"{step:>8}  {'loss of this step':<22}{'-':>16}{result['loss']:>16.8g}")
    if result["skipped"]:
        why = "it is a spike (optim.spike)" if result["finite"] else "it is not finite"
        norm = result["grad_norm"]
        say(f"step {step} is skipped: {why}; loss {result['loss']:.6g}, gradient norm {norm:.6g}")
    for at, module in result["not_finite"].items():
        say(f"step {at}: the first output that is not finite is that of {module}")
    weights = result["weights"]
    if weights is None:
        say(f"weights: not compared, since step {step} has no checkpoint")
    elif weights:
        worst = weights[0]
        say(
            f"weights: {len(weights)} tensors differ; the first is {worst['name']}, on rank "
            f"{worst['rank']}, by {worst['difference']:.1e} of its largest element"
        )
    else:
        say(f"weights: those of the checkpoint of step {step}")
    sizes = result["micro_batch_size"]
    if sizes["run"] not in (None, sizes["replay"]):
        say(
            f"The largest micro-batch has {sizes['replay']} samples, and had {sizes['run']} in the "
            "run: dropout, and layers that depend on the micro-batch, differ."
        )
    if result["batch"]:
        say(f"samples: {result['batch']}")
    if not result["compared"] and weights is None:
        say("nothing is compared: the run has no numbers of these steps")
        return
    words = "the same" if result["same"] else "NOT the same"
    say(f"{words} (tolerance {result['tolerance']:g})")
