"""The TensorBoard sink. Its events have the time at which they were logged."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from train.files import refuse_link
from train.profiling.files import PROFILE, NewTraces, place_copy
from train.secrets import redact_values
from train.track.event_files import EventFile, remove_from
from train.track.sinks import RunInfo, Sink

_log = logging.getLogger("train")


class TensorBoardSink(Sink):
    """Writes event files to tensorboard/, with the names that W&B has. The HParams tab has one row
    for the run, over all attempts.

    A resume removes the steps that the attempt repeats, and shows what happened in them at the
    first of them. What there is of the step from which the
    attempt resumes, such as an evaluation, is not written again.
    """

    name = "TensorBoard"

    def __init__(self, run: RunInfo) -> None:
        self.run = run
        self._directory = run.directory / "tensorboard"
        self._resumes = run.attempt > 1 and run.start_step > 0
        self._before: dict[int, set[str]] = {}
        """The tags at step 0, and at the step from which the attempt resumes."""
        self._last = run.start_step
        self._row: int | None = None
        """The last step with scalars."""
        self._traces = NewTraces(run.directory, run.attempt)
        self._events: tuple[int, list[str], float | None] | None = None
        """What happened at a step that is not over, and when."""

    def load(self) -> None:
        """Imports the writer."""
        import torch.utils.tensorboard.summary  # noqa: F401

    def open(self) -> None:
        """Opens a new event file for this attempt."""
        from torch.utils.tensorboard import summary

        self._make: Any = summary
        refuse_link(self._directory)
        if not self._directory.is_dir():
            self._directory.mkdir()  # never the run directory, if it was moved
        start = self.run.start_step
        # An attempt that starts from the beginning also repeats the evaluation before the first
        # step.
        purge = (start + 1 if start else 0) if self.run.attempt > 1 else None
        if purge is not None:
            self._before = remove_from(self._directory, purge)
            if texts := list(self._events_from(purge)):
                self._events = (purge, texts, None)
        self._file = EventFile(self._directory, purge)
        for about_run in self._about_run():
            self._write(0, about_run)  # no resumed attempt removes step 0

    def _events_from(self, step: int) -> Iterator[str]:
        """What happened in earlier attempts from a step on, which is removed with the steps that
        this attempt repeats."""
        begun: dict[int, int] = {}
        for event in self.run.events():
            first = begun.setdefault(event.attempt, event.step if event.attempt > 1 else 0)
            if max(event.step, first + bool(first)) >= step:  # see ``event``
                yield event.text

    def _about_run(self) -> list[Any]:
        from tensorboard.plugins.hparams import metadata, plugin_data_pb2

        data = plugin_data_pb2.HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION)
        session = data.session_start_info
        session.start_time_secs = time.time()
        for name, value in self.run.parameters().items():
            if isinstance(value, bool):
                session.hparams[name].bool_value = value
            elif isinstance(value, int | float) and math.isfinite(value):
                session.hparams[name].number_value = value
            elif value is not None:  # else TensorBoard takes a column of numbers for texts
                session.hparams[name].string_value = str(value)
        config = json.dumps(redact_values(self.run.config), indent=2, ensure_ascii=False)
        summary = str(self.run.facts.get("model_summary", ""))
        texts = {"config": config, "model_summary": summary}
        shown = [self._make.text(name, _code_block(text)) for name, text in texts.items() if text]
        return [self._hparams(metadata.SESSION_START_INFO_TAG, data), *shown]

    def _hparams(self, tag: str, data: Any) -> Any:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.plugins.hparams import metadata

        plugin = SummaryMetadata.PluginData(
            plugin_name=metadata.PLUGIN_NAME, content=data.SerializeToString()
        )
        value = Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))
        return Summary(value=[value])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one event with all scalars; one event each takes ten times as long."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = dict(metrics)
        if step != self._row:  # once, also if the evaluation of the step follows
            self._row, scalars["attempt"] = step, self.run.attempt
        self._write(
            step,
            Summary(value=[Summary.Value(tag=n, simple_value=v) for n, v in scalars.items()]),
        )

    def report(self, step: int, items: Mapping[str, Any]) -> None:
        """Writes texts (as code blocks) and images."""
        for name, item in items.items():
            if isinstance(item, str):
                self._write(step, self._make.text(name, _code_block(item)))
            else:
                self._write(step, self._make.image(name, item, dataformats="CHW"))

    def histograms(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one histogram per array."""
        for name, value in values.items():
            self._write(step, self._make.histogram(name, value, bins=_BINS))

    def event(self, step: int, text: str) -> None:
        """Writes it as a text named ``event``, when the step is over: all events of a step are one
        text. Those of the step from which the attempt resumes are at the next."""
        step = max(step, self.run.start_step + self._resumes)
        if self._events and self._events[0] != step:
            self._write_events()
        self._events = self._events or (step, [], self.logged_at)
        self._events[1].append(text)

    def trace(self, step: int, path: Path) -> None:
        """Puts the traces where TensorBoard's profiler plugin looks for them."""
        self._add_traces()

    def _add_traces(self) -> None:
        try:
            for trace in self._traces.take():
                folder = self._directory
                for name in (PROFILE, f"attempt-{trace.attempt}"):
                    folder = folder / name
                    refuse_link(folder)
                    folder.mkdir(exist_ok=True)
                # The plugin takes the first part for a worker and the number for a span.
                name = f"rank-{trace.rank}.{trace.step}.pt.trace.json.gz"
                place_copy(trace.path, folder / name)
        except OSError as error:
            _log.warning("A trace cannot be shown in TensorBoard: %s", error)

    def advance(self, step: int) -> None:
        """Writes the events of earlier steps."""
        if self._events and self._events[0] < step:
            self._write_events()

    def _write_events(self) -> None:
        if self._events:
            (step, texts, wall_time), self._events = self._events, None
            self._write(step, self._make.text("event", "\n\n".join(texts)), wall_time)

    def _write(self, step: int, summary: Any, wall_time: float | None = None) -> None:
        self.advance(step)
        before = self._before.get(step)
        if before:
            kept = [value for value in summary.value if value.tag not in before]
            if not kept:
                return
            summary = type(summary)(value=kept)
        self._last = max(self._last, step)
        self._file.write(step, summary, wall_time or self.logged_at)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Writes the final metrics as scalars of the last step."""
        numbers = {n: v for n, v in values.items() if isinstance(v, int | float)}
        if numbers:
            self.log(self._last, self.summary_names(numbers))

    def end(self, code: int) -> None:
        """Marks the row of the HParams tab as successful when the run is finished. Nothing is
        marked before, since TensorBoard keeps the first mark."""
        if code == 0:
            from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

            data = plugin_data_pb2.HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION)
            data.session_end_info.status = api_pb2.Status.Value("STATUS_SUCCESS")
            data.session_end_info.end_time_secs = self.logged_at or time.time()
            self._write(self._last, self._hparams(metadata.SESSION_END_INFO_TAG, data))

    def close(self) -> None:
        """Writes the last events and closes the file."""
        self._write_events()
        self._add_traces()  # those of other ranks
        self._file.close()


def _code_block(text: str) -> str:
    indented = text.replace("\n", "\n    ")
    return f"    {indented}"


def _bins() -> list[float]:
    """Those of torch's SummaryWriter: the limits grow by a tenth, in both directions from 0."""
    positive, limit = [], 1e-12
    while limit < 1e20:
        positive.append(limit)
        limit *= 1.1
    return [-limit for limit in reversed(positive)] + [0.0] + positive


_BINS = _bins()
