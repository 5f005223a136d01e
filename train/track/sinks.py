"""Sinks that need heavy libraries; each is opened and used only in the tracker's own thread."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from train.track.config import TrackConfig


@dataclass(frozen=True)
class RunInfo:
    """What sinks may know of the run."""

    id: str
    name: str
    directory: Path
    attempt: int
    wandb_id: str
    config: dict[str, Any]
    """The resolved config as JSON values."""
    code: dict[str, Any]
    """Versions and commit."""
    unit: str
    """What besides samples is counted, such as "tokens"."""
    total_steps: int
    start_step: int
    """The step that this attempt goes on from."""


class Sink(Protocol):
    """A place that metrics go to. May raise anything: the tracker then drops it."""

    name: str

    def open(self) -> str | None:
        """Imports and connects; returns something to be said, if there is anything."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Scalars of a step."""

    def report(self, step: int, items: Mapping[str, Any]) -> None:
        """Texts (str) and images (float array of shape (3, H, W) in [0, 1])."""

    def histograms(self, step: int, values: Mapping[str, Any]) -> None:
        """Arrays whose distribution is of interest."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """The final numbers."""

    def close(self) -> None:
        """Writes what is left."""


class TensorBoardSink:
    """Event files in tensorboard/; after a resume TensorBoard hides the steps taken again."""

    name = "TensorBoard"

    def __init__(self, run: RunInfo) -> None:
        self.run = run

    def open(self) -> None:
        """Opens a new event file beside those of earlier attempts."""
        from torch.utils.tensorboard import SummaryWriter

        start = self.run.start_step
        self._writer: Any = SummaryWriter(
            str(self.run.directory / "tensorboard"),
            purge_step=start + 1 if self.run.attempt > 1 else None,
            flush_secs=10,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One scalar per metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def report(self, step: int, items: Mapping[str, Any]) -> None:
        """Texts as they are (in a code block), images as images."""
        for name, item in items.items():
            if isinstance(item, str):
                indented = item.replace("\n", "\n    ")
                self._writer.add_text(name, f"    {indented}", step)
            else:
                self._writer.add_image(name, item, step)

    def histograms(self, step: int, values: Mapping[str, Any]) -> None:
        """One histogram per array."""
        for name, value in values.items():
            self._writer.add_histogram(name, value, step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """TensorBoard has no such thing."""

    def close(self) -> None:
        """Flushes the event file."""
        self._writer.close()


class WandbSink:
    """Weights & Biases, with our own step axis and one id through all restarts."""

    name = "W&B"

    def __init__(self, run: RunInfo, config: TrackConfig) -> None:
        self.run, self.config = run, config

    def open(self) -> str | None:
        """Starts or continues the W&B run; where it cannot be reached, offline."""
        # Else artifacts are staged in the home directory, where nobody ever cleans up.
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            os.environ.setdefault(name, str(self.run.directory / "wandb"))
        mode = wandb_mode(self.config.wandb)
        said = None
        try:
            self._run = self._init(mode)
        except Exception as error:
            if mode == "offline":
                raise
            said = f"W&B cannot be reached ({_first_line(error)}); its files are kept offline."
            mode = "offline"
            self._run = self._init(mode)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        if mode == "offline":
            sync = f"wandb sync {self.run.directory / 'wandb'}/offline-run-*"
            said = f"{said or 'W&B is offline.'} To upload: {sync}"
        return said

    def _init(self, mode: str) -> Any:
        import wandb

        return wandb.init(
            id=self.run.wandb_id,
            resume="allow",
            name=self.run.name,
            group=self.run.id,
            project=os.environ.get("WANDB_PROJECT") or self.config.wandb_project,
            entity=self.config.wandb_entity,
            tags=self.config.wandb_tags,
            config={**self.run.config, "code": self.run.code},
            dir=str(self.run.directory),
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(console="off", silent=True, init_timeout=20),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One history row; ``step`` is our own column, never W&B's."""
        self._run.log({"step": step, "attempt": self.run.attempt, **metrics})

    def report(self, step: int, items: Mapping[str, Any]) -> None:
        """Texts as preformatted HTML, images as images."""
        import html

        import wandb

        row: dict[str, Any] = {"step": step}
        for name, item in items.items():
            if isinstance(item, str):
                row[name] = wandb.Html(f"<pre>{html.escape(item)}</pre>")
            else:
                row[name] = wandb.Image(item.transpose(1, 2, 0))
        self._run.log(row)

    def histograms(self, step: int, values: Mapping[str, Any]) -> None:
        """One histogram per array."""
        import wandb

        rows = {name: wandb.Histogram(value) for name, value in values.items()}
        self._run.log({"step": step, **rows})

    def summary(self, values: Mapping[str, Any]) -> None:
        """The run's summary."""
        self._run.summary.update({f"final/{name}": value for name, value in values.items()})

    def close(self) -> None:
        """Ends this attempt; the run itself can go on."""
        self._run.finish()


def wandb_mode(wanted: str) -> str:
    """online or offline. "auto" is online only where the user has W&B configured: by WANDB_MODE,
    by a key in the environment, or by a login on this machine."""
    if wanted != "auto":
        return wanted
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return "online" if netrc.netrc(path).authenticators(host) else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else repr(error)
