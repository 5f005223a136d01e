"""Starts the trials of a study, watches them, and records how they end."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from launch.agent.signals import Signals
from launch.contract import (
    RUN_ID,
    WANDB_GROUP,
    WANDB_ID,
    Exit,
    RunDirectory,
    RunError,
    UsageError,
    did_you_mean,
    is_worth_retrying,
    log,
)
from launch.tune.backend import Backend
from launch.tune.halving import HalvingPruner
from launch.tune.result import write_best
from launch.tune.running import RunningTrial, exit_facts, named_exit
from launch.tune.study import Claim, Study
from launch.tune.trial import Evaluations, final_step, is_in_use
from launch.tune.wandb_sweep import GivenRun, SweepAgents, run_variables

_POLL = 0.1
"""Seconds between two looks at the trials."""
_LOOK_FOR_TRIALS = 1.0
"""Seconds between two looks into the storage for a trial, while others run here."""
_LONGEST_DELAY = 60.0
_FIRST_REPORT = 5.0
_LAST_END = 60.0
"""Seconds that trials may take to end after an error of this process."""


@dataclass(frozen=True)
class Plan:
    """What this process is to do, which may be different at each start."""

    files: Sequence[str]
    """Config files of all trials."""
    overrides: Sequence[str]
    """Their common overrides, without run.dir and run.name."""
    name: str
    """The base of their run.name."""
    trials: int
    """Trials that the study is to have, in whatever state."""
    retries: int
    """Further starts of a trial after failures of the infrastructure."""


class Controller:
    """Works on a study until there is nothing left to start. ``say`` prints a line for people."""

    def __init__(
        self,
        study: Study,
        plan: Plan,
        backend: Backend,
        signals: Signals,
        say: Callable[[str], None],
        agents: SweepAgents | None = None,
    ) -> None:
        """``agents``: those of the study's W&B sweep, if it has one."""
        self._agents = agents
        self._study, self._plan, self._backend = study, plan, backend
        self._signals, self._say = signals, say
        self._running: list[RunningTrial] = []
        self._error: RunError | None = None
        self._next_look = 0.0
        self._objectives = study.objectives
        self._single = len(self._objectives) == 1
        self._prunes = study.settings.pruner.partition(":")[0] != "none"

    @property
    def _stopping(self) -> bool:
        return self._signals.first is not None or self._error is not None

    def run(self) -> bool:
        """Whether it was asked to stop before the end. Raises RunError if a config error of a trial
        or a failure of the storage ends the study; its other trials have stopped then."""
        try:
            while True:
                for number in self._signals.take():
                    self._interrupt_all(number)
                self._obey_sweep()
                for running in list(self._running):
                    self._watch(running)
                if not self._stopping:
                    self._fill()
                if not self._running and not self._awaits_runs():
                    break
                time.sleep(_POLL)
        finally:
            self._end_all()
        if self._error is not None:
            raise self._error
        return self._signals.first is not None

    def _fill(self) -> None:
        """Starts trials in the free places."""
        taken = {running.place for running in self._running}
        free = [place for place in range(self._backend.parallel) if place not in taken]
        if self._running and time.monotonic() < self._next_look:
            return
        for place in free:
            claim = self._study.claim(self._plan.trials, partial(self._given, place))
            if claim is None:
                self._next_look = time.monotonic() + _LOOK_FOR_TRIALS
                return
            self._take(claim, place)

    def _given(self, place: int) -> GivenRun | None:
        return self._agents.next(place) if self._agents else None

    def _awaits_runs(self) -> bool:
        """Whether the W&B sweep may still give a run."""
        return self._agents is not None and not self._stopping and self._agents.is_awaited

    def _obey_sweep(self) -> None:
        """Tells W&B which runs go on, and ends what it wants to end."""
        if self._agents is None:
            return
        self._agents.set_running(
            {each.place: each.claim.wandb_run for each in self._running if each.claim.wandb_run}
        )
        for running in self._running:
            run = running.claim.wandb_run
            if run and running.claim.pruned_at is None and self._agents.wants_to_stop(run):
                self._prune(running, running.step or 0)
        if self._agents.error is not None and self._error is None:
            self._error = self._agents.error
            self._stop_all()

    def _take(self, claim: Claim, place: int, not_before: float = 0.0) -> None:
        plan, space = self._plan, self._study.space
        words = [word for file in plan.files for word in ("--config", file)]
        words += [*plan.overrides, *space.overrides(claim.assigned)]
        words += [f"run.name={plan.name}-{claim.number}", f"run.dir={claim.directory}"]
        running = RunningTrial(
            claim,
            place,
            self._backend.job(claim, words, place),
            Evaluations(claim.directory / "metrics.jsonl"),
            RunDirectory(claim.directory),
            not_before,
        )
        self._running.append(running)
        if not_before == 0.0 and running.job.find():
            self._say(f"trial {claim.number} goes on: {running.job.place}")
            if claim.pruned_at is not None:
                running.job.stop()
        self._watch(running)

    def _watch(self, running: RunningTrial) -> None:
        if not running.job.started:
            self._start_if_free(running)
            return
        code = running.job.code()  # first: nothing is reported after it
        self._read_evaluations(running)
        if code is not None:
            self._ended(running, code)

    def _start_if_free(self, running: RunningTrial) -> None:
        """Starts a trial once no process of a killed controller works on it any more."""
        claim, now = running.claim, time.monotonic()
        if self._stopping:
            self._leave(running)
        elif now < running.not_before:
            return
        elif claim.directory.exists() and is_in_use(running.run):
            if not running.reported_wait and now - running.waiting_since > _FIRST_REPORT:
                running.reported_wait = True
                log(f"Waiting for the processes of trial {claim.number}, which still run.")
        elif claim.pruned_at is not None:
            self._settle_pruned(running, Exit.PREEMPTED)
        else:
            resumed = running.run.exists
            values = " ".join(self._study.space.overrides(claim.assigned))
            if running.not_before == 0.0:
                self._say(f"trial {claim.number} {'goes on' if resumed else 'starts'}: {values}")
            running.job.start(self._variables(claim))
            if claim.reported and self._prunes:
                self._prune_if_due(running, max(claim.reported))

    def _variables(self, claim: Claim) -> dict[str, str]:
        """The environment variables by which the runs of the study belong together."""
        group = self._study.settings.base.config.track.wandb_group
        variables = {WANDB_GROUP: group or os.environ.get(WANDB_GROUP) or self._plan.name}
        if given := os.environ.get(RUN_ID):
            variables[RUN_ID] = variables[WANDB_ID] = f"{given}-{claim.number}"
        if self._study.sweep is not None and claim.wandb_run is not None:
            variables |= run_variables(self._study.sweep, claim.wandb_run)
            variables["WANDB_SWEEP_PARAM_PATH"] = str(self._study.write_parameters(claim))
        return variables

    def _read_evaluations(self, running: RunningTrial) -> None:
        for step, values in running.evaluations.new():
            if running.claim.pruned_at is not None or self._error is not None:
                return
            self._check_objectives(values)
            running.step = step
            if self._single and self._error is None:
                self._study.report(running.claim, step, values[self._objectives[0].name])
                if self._prunes:
                    self._prune_if_due(running, step)

    def _check_objectives(self, reported: Mapping[str, float]) -> None:
        for objective in self._objectives:
            if objective.name not in reported and self._error is None:
                self._error = UsageError(
                    f"The objective of the study is {objective.name!r}, but the task's evaluation "
                    f"reports only {', '.join(sorted(reported))}"
                    f"{did_you_mean(objective.name, reported).rstrip('.')}; correct --objective."
                )
                self._stop_all()

    def _prune_if_due(self, running: RunningTrial, step: int) -> None:
        """Asks the trial to stop if the pruner wants it; never after its last step."""
        running.final = running.final or final_step(running.run)
        if step == running.final or running.is_pausing:
            return
        if self._study.halving:
            self._pause_if_due(running, step, self._study.halving)
            return
        if self._study.should_prune(running.claim):
            self._prune(running, step)

    def _prune(self, running: RunningTrial, step: int) -> None:
        running.claim.note(pruned_at=step)  # before the request: it holds if this process dies
        running.job.stop()

    def _pause_if_due(self, running: RunningTrial, step: int, halving: HalvingPruner) -> None:
        claim = running.claim
        if step >= halving.rung(claim.number, claim.promoted):
            claim.note(paused=claim.promoted, step=step)  # before the request, as with pruning
            running.is_pausing = True
            running.job.stop()

    def _ended(self, running: RunningTrial, code: int) -> None:
        """Records what the exit code of a trial means."""
        claim = running.claim
        if claim.pruned_at is not None:
            self._settle_pruned(running, code)
        elif code == Exit.DONE:
            self._settle_finished(running)
        elif code == Exit.OUT_OF_MEMORY:
            self._settle_pruned(running, code)
        elif running.is_pausing and (is_worth_retrying(code) or code == Exit.STOPPED_AT_ONCE):
            claim.note(**exit_facts(code))
            self._say(f"trial {claim.number} paused at step {running.step}")
            self._leave(running)
        elif self._stopping and (is_worth_retrying(code) or code == Exit.STOPPED_AT_ONCE):
            self._leave(running)
        elif is_worth_retrying(code) and claim.retries < self._plan.retries:
            self._retry(running, code)
        else:
            self._settle_failed(running, code)

    def _retry(self, running: RunningTrial, code: int) -> None:
        claim = running.claim
        number = claim.retries + 1
        claim.note(retries=number)
        delay = min(2.0 ** (number - 1), _LONGEST_DELAY)
        self._say(
            f"trial {claim.number} ended with {named_exit(code)}{self._reason(running)}; retry "
            f"{number} of {self._plan.retries} in {delay:g} s"
        )
        self._running.remove(running)
        running.evaluations.close()
        self._take(claim, running.place, time.monotonic() + delay)

    def _settle_finished(self, running: RunningTrial) -> None:
        claim = running.claim
        end = running.run.finished() or {}
        metrics = end.get("metrics") or {}
        self._check_objectives(metrics)
        if self._error is not None:
            self._leave(running)
            return
        values = [metrics[each.name] for each in self._objectives]
        shown = ", ".join(
            f"{each.name} {value}" if value is None else f"{each.name} {value:.4g}"
            for each, value in zip(self._objectives, values, strict=True)
        )
        claim.note(exit_code=0, exit=Exit.DONE.name, step=end.get("step"))
        if not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
            claim.note(reason=f"the objective is not finite: {shown}")
            self._study.settle(claim, "failed")
            self._say(f"trial {claim.number} failed: its objective is not finite ({shown})")
        else:
            self._study.settle(claim, "finished", [float(value) for value in values])
            is_best = any(each.number == claim.number for each in self._study.best())
            if is_best:
                write_best(self._study, self._plan.files, self._plan.overrides)
            self._say(
                f"trial {claim.number} finished: {shown} at step {end.get('step')}"
                f"{' (best so far)' if is_best else ''}"
            )
        self._remove(running)

    def _settle_pruned(self, running: RunningTrial, code: int) -> None:
        claim = running.claim
        step = claim.pruned_at
        claim.note(**exit_facts(code))
        if step is None:
            claim.note(reason=running.job.last_error())
            self._say(
                f"trial {claim.number} pruned: {named_exit(code)}{self._reason(running)} "
                f"({running.job.place})"
            )
        else:
            claim.note(step=step)
            self._say(f"trial {claim.number} pruned at step {step}")
        self._study.settle(claim, "pruned")
        self._remove(running)

    def _settle_failed(self, running: RunningTrial, code: int) -> None:
        claim = running.claim
        reason = running.job.last_error()
        claim.note(**exit_facts(code), reason=reason, step=running.step)
        self._study.settle(claim, "failed")
        self._say(
            f"trial {claim.number} failed: {named_exit(code)}{self._reason(running)} "
            f"({running.job.place})"
        )
        self._remove(running)
        if code == Exit.USAGE and self._error is None:
            self._error = UsageError(
                f"Trial {claim.number} ended with a config error, which ends the study"
                f"{self._reason(running) or '; read ' + running.job.place}. Correct the "
                "config, the space or the task, then rerun: the study goes on with its next trial."
            )
            self._stop_all()

    def _reason(self, running: RunningTrial) -> str:
        reason = running.job.last_error()
        return f": {reason.rstrip('.')}" if reason else ""

    def _leave(self, running: RunningTrial) -> None:
        """Leaves a trial unfinished, for another start of the study."""
        self._study.give_up(running.claim)
        self._remove(running)

    def _remove(self, running: RunningTrial) -> None:
        running.evaluations.close()
        self._running.remove(running)

    def _stop_all(self) -> None:
        for running in self._running:
            running.job.stop()

    def _interrupt_all(self, number: signal.Signals) -> None:
        """Passes a signal on; trials that run on without this process are left to the next."""
        for running in list(self._running):
            if running.job.started and not running.job.interrupt(number):
                self._say(f"trial {running.claim.number} runs on: {running.job.place}")
                self._leave(running)

    def _end_all(self) -> None:
        """After an unexpected error: asks what still runs to stop, and waits for that."""
        self._interrupt_all(signal.SIGTERM)
        last = time.monotonic() + _LAST_END
        for running in list(self._running):
            while running.job.started and running.job.code() is None:
                if time.monotonic() > last:
                    running.job.kill()
                time.sleep(_POLL)
            self._leave(running)
        self._backend.close()
