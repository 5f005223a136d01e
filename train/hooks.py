"""Hooks: code of the user's that a run calls at fixed points, without an effect on the result.

Subclass :class:`Hook` anywhere and name the class in the config: ``hooks=[my_hooks:Timer]``. A hook
gets facts that it cannot change. It cannot change the result silently either: the global random
generators are restored after each call, and a change to torch's settings ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from train.exits import Exit, RunError, UsageError, first_line, prefixed
from train.plugins import Plugin, find_plugin
from train.process.diagnose import as_run_error, is_lost_peer
from train.process.stop_signals import is_of_signal
from train.suggest import did_you_mean


@dataclass(frozen=True)
class Facts:
    """What a hook knows of the run at the moment of its call."""

    id: str
    """The run's id."""
    name: str
    """The run's name."""
    directory: Path
    """The run directory. To stop the run, create the file ``stop`` in it."""
    config: Mapping[str, Any]
    """The resolved config as plain values."""
    rank: int
    world_size: int
    total_steps: int
    step: int = 0
    """Optimiser steps taken."""
    position: int = 0
    """Samples used."""
    metrics: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """The newest value of each metric logged so far, by the names of metrics.jsonl."""
    checkpoint: Path | None = None
    """The newest committed checkpoint."""
    exit: Exit | None = None
    """How the run ends; only for ``on_run_end`` and ``on_failure``."""
    error: str | None = None
    """The text of the error that ends the run; only for ``on_failure``."""


class Hook:
    """Base class of all hooks; what it does not override is not called.

    All methods are called in the main thread and the run waits for them. An error ends the run.
    Each call is made at most once in an attempt: a process that is killed makes no further call.
    """

    every_rank: ClassVar[bool] = False
    """False: called on rank 0 only. True: called on every rank at the same point, so that
    collective operations of torch.distributed are allowed."""

    def on_run_start(self, facts: Facts) -> None:
        """Before the first step of an attempt."""

    def on_step_end(self, facts: Facts) -> None:
        """After each optimiser step. Metrics are those of the last logged step."""

    def on_evaluation(self, facts: Facts) -> None:
        """After each evaluation; its metrics are those named ``eval/...``."""

    def on_checkpoint(self, facts: Facts) -> None:
        """After a checkpoint was committed; ``facts.checkpoint`` is its path. As checkpoints are
        written beside the training, the run may be some steps further by then."""

    def on_run_end(self, facts: Facts) -> None:
        """When the run is finished or stopped on request, not when it fails."""

    def on_failure(self, facts: Facts) -> None:
        """When an error ends the attempt; ``facts.exit`` and ``facts.error`` say which. Called on
        this rank only, also with ``every_rank``: collective operations would wait for ranks that
        do not call it. Not called at a second Ctrl-C. An error in it is a warning."""


def find_hooks(plugins: Sequence[Plugin], origin: str) -> list[type[Hook]]:
    """The classes of the hooks that a config names; ``origin`` says where. Raises UsageError."""
    found: list[type[Hook]] = []
    for plugin in plugins:
        cls = find_plugin(plugin, Hook, f"hooks ({origin})")
        for name in dir(cls):
            if name.startswith("on_") and not hasattr(Hook, name):
                calls = [known for known in dir(Hook) if known.startswith("on_")]
                raise UsageError(
                    f"hooks ({origin}) names {plugin.use!r}, whose {name} is not a method of "
                    f"train.Hook, so it would not be called{did_you_mean(name, calls)}"
                )
        found.append(cls)
    return found


class Hooks:
    """Calls the hooks of a run. Each method is called on every rank at the same point."""

    def __init__(
        self,
        plugins: Sequence[Plugin],
        facts: Facts,
        *,
        origin: str = "default",
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._facts = replace(facts, config=_frozen(facts.config))
        self._warn, self._warned = warn, set[str]()
        self._hooks: list[tuple[str, Hook]] = []
        for plugin, cls in zip(plugins, find_hooks(plugins, origin), strict=True):
            if cls.every_rank or facts.rank == 0:
                self._hooks.append((plugin.use, self._make(plugin, cls)))

    def _make(self, plugin: Plugin, cls: type[Hook]) -> Hook:
        try:
            return cls(**plugin.options)
        except BaseException as error:
            if is_of_signal(error):
                raise
            raise _failed(plugin.use, "its constructor", error) from error

    def run_start(self, step: int, position: int) -> None:
        """The attempt begins, at this step."""
        self._call("on_run_start", step=step, position=position)

    def step_end(self, step: int, position: int) -> None:
        """An optimiser step was taken."""
        self._call("on_step_end", step=step, position=position)

    def logged(self, metrics: Mapping[str, float]) -> None:
        """Metrics were logged, by their full names; calls nothing."""
        if self._hooks:
            merged = MappingProxyType({**self._facts.metrics, **metrics})
            self._facts = replace(self._facts, metrics=merged)

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """An evaluation was made; metrics have their full names (``eval/...``)."""
        self.logged(metrics)
        self._call("on_evaluation")

    def checkpoint(self, path: Path | None) -> None:
        """The newest committed checkpoint, as all ranks know; calls the hooks if it is new."""
        if path is not None and path != self._facts.checkpoint:
            self._call("on_checkpoint", checkpoint=path)

    def run_end(self, code: Exit) -> None:
        """The run is finished, or stopped on request and saved."""
        self._call("on_run_end", exit=code)

    def failure(self, code: Exit, text: str) -> None:
        """An error ends the attempt on this rank; raises nothing."""
        self._facts = replace(self._facts, exit=code, error=text)
        for name, hook in self._hooks:
            try:
                hook.on_failure(self._facts)
            except BaseException as error:
                if is_of_signal(error):
                    raise
                self._warn(
                    f"The hook {name!r} failed in on_failure ({type(error).__name__}: "
                    f"{first_line(error)})."
                )

    def _call(self, method: str, **changes: Any) -> None:
        if not self._hooks:
            return
        self._facts = replace(self._facts, **changes)
        for name, hook in self._hooks:
            if getattr(type(hook), method) is not getattr(Hook, method):
                self._call_one(name, hook, method)

    def _call_one(self, name: str, hook: Hook, method: str) -> None:
        from train.distributed.randomness import GlobalRngState
        from train.distributed.torch_settings import TorchSettings

        generators, settings = GlobalRngState(cuda=True), TorchSettings()
        try:
            getattr(hook, method)(self._facts)
        except BaseException as error:
            if is_of_signal(error) or is_lost_peer(error):
                raise  # the latter in a collective operation of the hook
            raise _failed(name, f"{method} at step {self._facts.step}", error) from error
        if generators.changed():
            generators.restore()
            if name not in self._warned:
                self._warned.add(name)
                self._warn(
                    f"The hook {name!r} drew random numbers from a global generator in {method}; "
                    "the generator was put back. Use a generator of the hook's own."
                )
        if changed := settings.changed():
            raise UsageError(
                f"The hook {name!r} changed a setting of torch in {method} ({', '.join(changed)}), "
                "which can change the result; restore it before the method returns."
            )


def _failed(name: str, where: str, error: BaseException) -> RunError:
    """The error that ends the run, which names the hook and keeps the exit code of a RunError."""
    known = as_run_error(error)
    if known:
        return prefixed(f"The hook {name!r} in {where}", known)
    return RunError(
        f"The hook {name!r} failed in {where} ({type(error).__name__}: {first_line(error)}); fix "
        "it, or remove it from hooks."
    )


def _frozen(value: Any) -> Any:
    """Nested plain values that cannot be changed."""
    if isinstance(value, Mapping):
        return MappingProxyType({key: _frozen(item) for key, item in value.items()})
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
