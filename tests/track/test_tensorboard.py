"""The TensorBoard sink, checked with the event files that it writes."""

import time

import numpy as np
import pytest

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from tests.track.conftest import run_info
from train.track.tensorboard import TensorBoardSink


def read(directory):
    """All attempts as TensorBoard shows them."""
    events = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0})
    return events.Reload()


def scalars(events, name):
    return [(event.step, event.value) for event in events.Scalars(name)]


def opened(directory, **changes):
    sink = TensorBoardSink(run_info(directory, **changes))
    sink.load()
    sink.open()
    return sink


def test_everything_can_be_read_back(tmp_path, track):
    tracker = track([TensorBoardSink(run_info(tmp_path))])
    image = np.zeros((3, 4, 6), dtype=np.float32)
    image[0] = 1.0
    tracker.log(1, {"train/loss": 2.5})
    tracker.log(2, {"train/loss": 1.5, "eval/accuracy": 0.25})
    tracker.report(2, {"sample": "<b>not bold</b>\n  indented", "drawn": image})
    tracker.histograms(2, {"weights/0.weight": np.linspace(-1, 3, 100, dtype=np.float32)})
    tracker.close()

    events = read(tmp_path)
    assert scalars(events, "train/loss") == [(1, 2.5), (2, 1.5)]
    assert scalars(events, "eval/accuracy") == [(2, 0.25)]
    (text,) = events.Tensors("sample/text_summary")
    shown = tensor_util.make_ndarray(text.tensor_proto).item().decode()
    assert shown == "    <b>not bold</b>\n      indented", (
        "the text must be a code block in Markdown"
    )
    (drawn,) = events.Images("drawn")
    assert (drawn.step, drawn.width, drawn.height) == (2, 6, 4)
    (histogram,) = events.Histograms("weights/0.weight")
    assert histogram.step == 2
    value = histogram.histogram_value
    assert (value.num, value.min, value.max) == (100, -1.0, 3.0)


class SlowToLoad(TensorBoardSink):
    """Its imports take longer than some rows."""

    def load(self):
        time.sleep(0.3)
        super().load()


def test_events_have_the_time_at_which_they_were_logged(tmp_path, track):
    tracker = track([SlowToLoad(run_info(tmp_path))])
    started = time.time()
    tracker.log(1, {"train/loss": 2.5})
    time.sleep(0.1)
    tracker.report(2, {"sample": "text", "drawn": np.zeros((3, 4, 6))})
    tracker.histograms(2, {"weights/0": np.ones(3)})
    logged = time.time()
    tracker.close()
    events = read(tmp_path)
    rows = [("Scalars", "train/loss"), ("Tensors", "sample/text_summary")]
    rows += [("Images", "drawn"), ("Histograms", "weights/0")]
    times = [getattr(events, kind)(name)[0].wall_time for kind, name in rows]
    assert started <= times[0] <= times[1] - 0.1
    assert times[1] <= times[2] <= times[3] <= logged


def test_the_image_has_its_colours(tmp_path, track):
    import io

    from PIL import Image

    tracker = track([TensorBoardSink(run_info(tmp_path))])
    image = np.zeros((3, 2, 2))
    image[0], image[1], image[2] = 0.5, 7.0, np.nan  # what is out of range is cut off
    tracker.report(1, {"drawn": image})
    tracker.close()
    (drawn,) = read(tmp_path).Images("drawn")
    assert Image.open(io.BytesIO(drawn.encoded_image_string)).getpixel((0, 0)) == (128, 255, 0)


def test_repeated_steps_are_shown_once(tmp_path):
    first = opened(tmp_path)
    for step in (1, 2, 3, 4):
        first.log(step, {"train/loss": 1.0})
    first.close()
    second = opened(tmp_path, attempt=2, start_step=2)
    for step in (3, 4, 5):
        second.log(step, {"train/loss": 2.0})
    second.close()
    expected = [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    assert scalars(read(tmp_path), "train/loss") == expected


def test_an_attempt_from_the_beginning_replaces_earlier_ones(tmp_path):
    """Including the evaluation before the first step."""
    for attempt in (1, 2):
        sink = opened(tmp_path, attempt=attempt)
        sink.log(0, {"eval/loss": float(attempt)})
        sink.close()
    assert scalars(read(tmp_path), "eval/loss") == [(0, 2.0)]


def test_non_finite_values_do_not_fail_the_sink(tmp_path, track, capfd):
    tracker = track([TensorBoardSink(run_info(tmp_path))])
    nan, inf = float("nan"), float("inf")
    tracker.histograms(
        1,
        {
            "gradients/some": np.array([nan, 1.0, -inf, 2.0], dtype=np.float32),
            "gradients/all": np.array([nan, inf]),
            "weights/empty": np.empty((0, 3)),
        },
    )
    tracker.log(1, {"train/loss": nan})
    tracker.log(2, {"train/loss": 1.0})
    tracker.close()
    events = read(tmp_path)
    assert events.Tags()["histograms"] == ["gradients/some"]
    (histogram,) = events.Histograms("gradients/some")
    assert histogram.histogram_value.num == 2
    assert scalars(events, "train/loss")[1] == (2, 1.0)
    assert capfd.readouterr().err == ""
