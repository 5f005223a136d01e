"""The TensorBoard sink. Its events have the time at which they were logged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train.files import refuse_link
from train.track.sinks import RunInfo, Sink


class TensorBoardSink(Sink):
    """Writes event files to tensorboard/. After a resume TensorBoard hides the repeated steps."""

    name = "TensorBoard"

    def __init__(self, run: RunInfo) -> None:
        self.run = run

    def load(self) -> None:
        """Imports the writer."""
        import torch.utils.tensorboard  # noqa: F401

    def open(self) -> None:
        """Opens a new event file for this attempt."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        self._summary: Any = Summary
        start = self.run.start_step
        # TensorBoard hides earlier events from this step on. An attempt that starts from the
        # beginning also repeats the evaluation before the first step.
        purge = (start + 1 if start else 0) if self.run.attempt > 1 else None
        # With TensorFlow installed, events are buffered, and lost if the process is killed.
        directory = self.run.directory / "tensorboard"
        refuse_link(directory)
        self._writer: Any = SummaryWriter(str(directory), purge_step=purge, flush_secs=1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one event with all scalars; one event each takes ten times as long."""
        values = [self._summary.Value(tag=name, simple_value=v) for name, v in metrics.items()]
        self._writer.file_writer.add_summary(
            self._summary(value=values), step, walltime=self.logged_at
        )

    def report(self, step: int, items: Mapping[str, Any]) -> None:
        """Writes texts (as code blocks) and images."""
        for name, item in items.items():
            if isinstance(item, str):
                indented = item.replace("\n", "\n    ")
                self._writer.add_text(name, f"    {indented}", step, walltime=self.logged_at)
            else:
                self._writer.add_image(name, item, step, walltime=self.logged_at)

    def histograms(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one histogram per array."""
        for name, value in values.items():
            self._writer.add_histogram(name, value, step, walltime=self.logged_at)

    def event(self, step: int, text: str) -> None:
        """Writes it as a text named ``events``."""
        self._writer.add_text("events", text, step, walltime=self.logged_at)

    def close(self) -> None:
        """Flushes the event file."""
        self._writer.close()
