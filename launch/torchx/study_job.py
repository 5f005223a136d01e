"""``isorun tune`` as a job: its command line, checked before it is submitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.contract import UsageError, import_extra
from launch.torchx.app import literal
from launch.torchx.shape import Shape, parse
from launch.torchx.train_command import train_command

MODULE = "launch"


@dataclass(frozen=True)
class StudyPlace:
    """Where the trials of a job run: on its node, or as jobs of their own."""

    shape: Shape
    """Of each trial."""
    parallel: int
    options: Sequence[str]
    """Of ``tune``; empty for trials on the node."""

    @property
    def node(self) -> str:
        """``-j`` of the job of the study."""
        if self.options:
            return "1x1"
        processes = self.shape.processes
        return f"1x{processes * self.parallel}" if processes else "1xauto"

    def processes(self, node: Shape) -> int:
        """Ranks of a trial on the node. Raises UsageError for too few GPUs."""
        if self.shape.processes is not None:
            return self.shape.processes
        if node.processes is None:
            return 1
        if node.processes < self.parallel:
            raise UsageError(
                f"--parallel is {self.parallel}, but the node has {node.processes} GPUs; set it to "
                f"at most {node.processes}."
            )
        return node.processes // self.parallel

    def world_size(self, node: Shape) -> int:
        """Ranks of a trial; 1 if that is unknown before it starts."""
        return (self.shape.world_size or 1) if self.options else self.processes(node)


def place_of(
    j: str, parallel: int, scheduler: str | None, cfg: str | None, job: Sequence[str]
) -> StudyPlace:
    """Where the trials run, by the arguments of the component. Raises UsageError."""
    shape = parse(j)
    if parallel < 1:
        raise UsageError(f"--parallel must be a whole number of at least 1, but is {parallel}.")
    if scheduler is None:
        for option, value in (("--cfg", cfg), ("--job", ",".join(job))):
            if value:
                raise UsageError(
                    f"{option} {value} is for trials that are jobs; give --scheduler too."
                )
        if shape.max_nodes > 1:
            raise UsageError(
                f"-j is {j!r}, but the trials of this job run on its one node; give 1xPROCESSES, "
                "or --scheduler to submit each trial as a job."
            )
        return StudyPlace(shape, parallel, ())
    words = ["--scheduler", scheduler, "-j", j, *(["-cfg", cfg] if cfg else [])]
    words += [word for each in job for word in ("--job", each)]
    return StudyPlace(shape, parallel, words)


@dataclass(frozen=True)
class StudyJob:
    """What ``tune`` is to do, as the component has it."""

    space: str
    files: Sequence[str]
    overrides: Sequence[str]
    trials: int
    objectives: Sequence[str]
    sampler: str
    pruner: str
    storage: str | None
    retries: int

    def name(self, check: bool, place: StudyPlace, node: Shape) -> str:
        """run.name; with ``check`` the settings are validated. Raises UsageError."""
        for option, value in (("trials", self.trials), ("retries", self.retries)):
            if value < 0:
                raise UsageError(f"--{option} must not be negative, but is {value}.")
        plain = train_command(self.files, self.overrides, check=False, world_size=None)
        if not check:
            return plain.name
        import_extra("optuna", "tune", "isorun.tune", "pass --check False")
        from launch.tune.checked import checked_settings

        settings = checked_settings(
            self.space, self.files, self.overrides, objectives=self.objectives,
            sampler=self.sampler, pruner=self.pruner, world_size=place.world_size(node),
        )  # fmt: skip
        return settings.base.config.run.name

    def arguments(self, place: StudyPlace, node: Shape) -> list[str]:
        """The arguments of ``python``."""
        words = [word for file in self.files for word in ("--config", file)]
        words += ["--space", self.space]
        words += ["--trials", str(self.trials)] if self.trials else []
        words += [word for each in self.objectives for word in ("--objective", each)]
        words += ["--sampler", self.sampler, "--pruner", self.pruner]
        words += ["--storage", self.storage] if self.storage else []
        words += ["--retries", str(self.retries), "--parallel", str(place.parallel)]
        words += place.options or ["--processes", str(place.processes(node))]
        return ["-m", MODULE, "tune", *literal([*words, *self.overrides])]
