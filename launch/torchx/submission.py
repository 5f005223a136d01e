"""Submits many similar jobs of ``isorun.fit`` from one process, and asks for their states."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from launch.contract import UsageError, did_you_mean, first_line
from launch.history.launches import all_launches
from launch.torchx import options
from launch.torchx.refusals import refusals
from launch.torchx.words import check_words, component

COMPONENT = "isorun.fit"
LOCAL = "local_cwd"
"""The scheduler whose jobs end with the command that started them."""
_OURS = {"config", "name"}
"""Arguments of the component that each job has of its own."""


@dataclass(frozen=True)
class JobOptions:
    """How jobs are submitted: the options of a command line."""

    scheduler: str
    cfg: str = ""
    """Options of the scheduler, KEY=VALUE,..."""
    j: str = ""
    """Nodes and processes; empty for the component's default."""
    component: Sequence[str] = field(default_factory=tuple)
    """Further arguments of ``isorun.fit`` as NAME=VALUE."""

    def words(self) -> list[str]:
        """The component's arguments. Raises UsageError."""
        from inspect import signature

        names = [name for name in signature(component(COMPONENT)).parameters if name != "overrides"]
        given = ["-j", self.j] if self.j else []
        for word in self.component:
            name, equals, value = word.partition("=")
            if not equals or name not in names or name in _OURS:
                known = [each for each in names if each not in _OURS]
                raise UsageError(
                    f"--job is {word!r}, but must be an argument of {COMPONENT} as NAME=VALUE"
                    f"{did_you_mean(name, known)} Its arguments are {', '.join(known)}."
                )
            if name == "j" and self.j:
                raise UsageError(f"-j {self.j} and --job {word} are both given; remove one.")
            given += [f"-{name}" if len(name) == 1 else f"--{name}", value]
        return given


class Submitter:
    """A TorchX runner with the options of a command line."""

    def __init__(self, job_options: JobOptions, defaults: Mapping[str, Any] | None = None) -> None:
        """``defaults``: values of the scheduler's options where it has them. Raises UsageError for
        wrong options."""
        from torchx.runner import get_runner
        from torchx.runner.config import apply, load_sections

        self.scheduler = name = job_options.scheduler
        sections = load_sections(prefix="component")
        self._defaults = sections.get(COMPONENT)
        with self._asking(f"use {name}"):
            self._runner = get_runner(component_defaults=sections)
        known = self._runner.scheduler_backends()
        if name not in known:
            raise UsageError(
                f"--scheduler is {name!r}, but must be one of {', '.join(known)}"
                f"{did_you_mean(name, known)}"
            )
        with self._asking(f"use {name}"):
            run_opts = self._runner.scheduler_run_opts(name)
        self._cfg = options.parse(job_options.cfg, run_opts, name)
        with self._asking(f"use {name}"):
            apply(name, self._cfg)  # makes a scheduler, to know its options
        for option, value in (defaults or {}).items():
            if run_opts.get(option) is not None:
                self._cfg.setdefault(option, value)
        try:
            run_opts.resolve(self._cfg)
        except Exception as error:  # TorchX's own exception, and built-in ones
            raise UsageError(
                f"The options of {name} are wrong: {first_line(error)}; correct -cfg or the "
                f"section [{name}] of .torchxconfig (`torchx runopts {name}`)."
            ) from None
        self._words = job_options.words()

    def prepare(
        self, files: Sequence[str], overrides: Sequence[str], variables: Mapping[str, str]
    ) -> Any:
        """A job that is checked and not submitted. ``variables`` are added to its environment.
        Raises RunError."""
        from torchx.specs.builders import materialize_appdef

        config = ["--config", ",".join(files)] if files else []
        words = [*self._words, *config, *overrides]
        check_words(COMPONENT, words, self._defaults, f"--job of `{COMPONENT}`:")
        with self._asking(f"prepare the job for {self.scheduler}"):
            app = materialize_appdef(component(COMPONENT), words, self._defaults)
            for role in app.roles:
                role.env.update(variables)
            return self._runner.dryrun(app, self.scheduler, cfg=self._cfg)

    def submit(self, prepared: Any) -> str:
        """Submits a job once; returns its handle. Raises RunError."""
        with self._asking(f"submit the job to {self.scheduler}"):
            return str(self._runner.schedule(prepared))

    def state(self, handle: str) -> str | None:
        """TorchX's name of a job's state; None if the scheduler does not know the job. Raises
        RunError."""
        with self._asking(f"read the state of {handle}"):
            status = self._runner.status(handle)
        return None if status is None else str(status.state.name)

    def cancel(self, handle: str) -> None:
        """Asks a job to stop. Raises RunError."""
        with self._asking(f"stop {handle}"):
            self._runner.cancel(handle)

    def close(self) -> None:
        """Stops the jobs that end with this command."""
        with self._asking(f"stop the jobs of {self.scheduler}"):
            self._runner.close()

    @contextmanager
    def _asking(self, doing: str) -> Iterator[None]:
        """Errors are one sentence, TorchX's messages are left out, and signals stay ours: TorchX's
        local schedulers install handlers of their own."""
        kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        torchx, level = logging.getLogger("torchx"), logging.getLogger("torchx").level
        torchx.setLevel(logging.ERROR)
        try:
            with refusals(doing):
                yield
        finally:
            torchx.setLevel(level)
            for number, handler in kept.items():
                signal.signal(number, handler)


def recorded_code(handle: str) -> int | None:
    """The exit code of a job that has ended, by the launch log: that of the node that failed first;
    None if the scheduler does not tell."""
    return next((x.exit_code for x in all_launches() if x.handle == handle), None)


def submitted_handle(run_id: str) -> str | None:
    """The newest job that was submitted for a run, by the launch log."""
    handles = [launch.handle for launch in all_launches() if launch.run_id == run_id]
    return handles[-1] if handles else None
