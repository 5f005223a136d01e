"""The TensorBoard sink, checked with the event files that it writes."""

import time

import numpy as np
import pytest

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups
from tensorboard.util import tensor_util

from tests.track.conftest import run_info
from train.track.event_log import EVENTS, EventLog
from train.track.tensorboard import TensorBoardSink


def read(directory):
    """All attempts as TensorBoard shows them."""
    everything = dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0)
    events = EventAccumulator(str(directory / "tensorboard"), size_guidance=everything)
    return events.Reload()


def scalars(events, name):
    return [(event.step, event.value) for event in events.Scalars(name)]


def opened(directory, **changes):
    sink = TensorBoardSink(run_info(directory, **changes))
    sink.load()
    sink.open()
    return sink


def texts(events, name):
    """The texts of a name, by step; each step must occur once."""
    found = events.Tensors(f"{name}/text_summary")
    assert len({event.step for event in found}) == len(found)
    return {
        event.step: tensor_util.make_ndarray(event.tensor_proto).item().decode() for event in found
    }


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


def attempt(directory, number, start, end, **changes):
    """An attempt that is killed: it is never closed."""
    sink = opened(directory, attempt=number, start_step=start, **changes)
    sink.event(start, f"Attempt {number} starts.")
    for step in range(start + 1, end + 1):
        sink.log(step, {"train/loss": float(number)})
        if step % 10 == 0:
            sink.log(step, {"eval/loss": float(number)})
            sink.report(step, {"sample": f"by {number}", "drawn": np.zeros((3, 2, 2), np.uint8)})
            sink.histograms(step, {"weights/0": np.full(5, number)})
        sink.advance(step + 1)
    return sink


def test_over_several_kills_each_step_is_shown_once_in_all_kinds_of_data(tmp_path):
    attempt(tmp_path, 1, 0, 37)
    attempt(tmp_path, 2, 20, 34)
    attempt(tmp_path, 3, 30, 30)  # does nothing but start
    attempt(tmp_path, 4, 30, 31)
    last = attempt(tmp_path, 5, 30, 50)
    last.summary({"loss": 0.5, "goodput/percent": 90.0})
    last.end(0)
    last.close()
    again = attempt(tmp_path, 6, 50, 50)
    # The evaluation of the step from which an attempt resumes is sometimes made again.
    again.log(50, {"eval/loss": 6.0, "eval/late": 6.0})
    again.report(50, {"sample": "by 6", "drawn": np.ones((3, 2, 2), np.uint8)})
    again.summary({"loss": 0.6, "goodput/percent": 91.0})
    again.end(0)
    again.close()
    events = read(tmp_path)
    tags = events.Tags()
    kinds = ("scalars", "images", "histograms", "tensors")
    for kind in kinds:
        for tag in tags[kind]:
            steps = [event.step for event in getattr(events, kind.title())(tag)]
            assert steps == sorted(set(steps)), (tag, steps)
    by = [1] * 20 + [2] * 10 + [5] * 20
    assert scalars(events, "train/loss") == list(enumerate(map(float, by), 1))
    assert scalars(events, "attempt") == list(enumerate(map(float, by), 1))
    assert {e.step for e in events.Images("drawn")} == {10, 20, 30, 40, 50}
    assert [e.step for e in events.Histograms("weights/0")] == [10, 20, 30, 40, 50]
    assert texts(events, "sample") == {s: f"    by {by[s - 1]}" for s in range(10, 51, 10)}
    assert scalars(events, "eval/late") == [(50, 6.0)]
    assert scalars(events, "final/loss") == [(50, 0.5)]
    assert scalars(events, "goodput/percent") == [(50, 90.0)]
    assert texts(events, "event") == {
        0: "Attempt 1 starts.", 21: "Attempt 2 starts.", 31: "Attempt 5 starts.",
        51: "Attempt 6 starts.",
    }  # fmt: skip


def test_files_are_in_the_order_of_attempts_also_if_a_clock_goes_back(tmp_path, monkeypatch):
    for number in range(1, 13):  # a second has several, and 10 comes before 9 as a text
        monkeypatch.setattr(time, "time", lambda n=number: 1_800_000_000.0 - 100 * (n % 3))
        attempt(tmp_path, number, number - 1, number + 3)
    monkeypatch.undo()
    assert scalars(read(tmp_path), "train/loss") == [
        (step, float(min(step, 12))) for step in range(1, 16)
    ]


def test_a_file_that_a_kill_has_cut_off_does_not_hide_the_others(tmp_path):
    attempt(tmp_path, 1, 0, 20)
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    resumed = attempt(tmp_path, 2, 20, 25)
    resumed.log(20, {"eval/loss": 2.0})
    assert [step for step, _ in scalars(read(tmp_path), "train/loss")] == list(range(1, 26))
    assert scalars(read(tmp_path), "eval/loss") == [(10, 1.0), (20, 1.0)]


def test_events_of_a_step_are_one_text(tmp_path):
    sink = opened(tmp_path)
    sink.event(0, "One.")
    sink.event(0, "Two.")
    sink.log(3, {"train/loss": 1.0})
    sink.event(3, "Three.")
    sink.event(5, "Four.")
    sink.close()
    expected = {0: "One.\n\nTwo.", 3: "Three.", 5: "Four."}
    assert texts(read(tmp_path), "event") == expected


def test_what_happened_in_repeated_steps_is_shown_at_the_first_of_them(tmp_path):
    for number, start, steps in [(1, 0, (15, 35)), (2, 20, (25,)), (3, 20, (22,)), (4, 0, (5,))]:
        log = EventLog(tmp_path / EVENTS, number)
        sink = opened(tmp_path, attempt=number, start_step=start)
        for step in (start, *steps):
            text = f"{number} at {step}."
            log.append(step, text)
            sink.event(step, text)
        sink.advance(steps[-1])  # the last one is lost with the process
        log.close()
        if number == 3:
            repeated = ["1 at 35.", "2 at 20.", "2 at 25.", "3 at 20."]
            assert texts(read(tmp_path), "event") == {
                0: "1 at 0.", 15: "1 at 15.", 21: "\n\n".join(repeated),
            }  # fmt: skip
    (shown,) = texts(read(tmp_path), "event").values()
    assert shown.split("\n\n") == ["1 at 0.", "1 at 15.", *repeated, "3 at 22.", "4 at 0."]


def hparams(logdir):
    """The rows of TensorBoard's HParams tab: their values, metrics and status, by run."""
    context = backend_context.Context(base_plugin.TBContext(data_provider=provider(logdir)))
    ctx = RequestContext()
    metadata = context.hparams_metadata(ctx, "")
    found = context.experiment_from_metadata(
        ctx, "", True, metadata, context.hparams_from_data_provider(ctx, "", None)
    )
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=100, include_metrics=True,
        allowed_statuses=[api_pb2.STATUS_SUCCESS, api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_RUNNING],
        col_params=[
            *(api_pb2.ColParams(hparam=info.name) for info in found.hparam_infos),
            *(api_pb2.ColParams(metric=info.name) for info in found.metric_infos),
        ],
    )  # fmt: skip
    rows = list_session_groups.Handler(ctx, context, "", request).run().session_groups
    values = {}
    for row in rows:
        (session,) = row.sessions
        set_values = {name: getattr(v, v.WhichOneof("kind")) for name, v in row.hparams.items()}
        metrics = {metric.name.tag: metric.value for metric in row.metric_values}
        values[session.name] = set_values, metrics, api_pb2.Status.Name(session.status)
    return values, {info.name for info in found.hparam_infos if info.differs}


def provider(logdir):
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    return MultiplexerDataProvider(multiplexer, str(logdir))


def test_runs_compare_in_the_hparams_tab_also_if_they_were_killed(tmp_path):
    config = {
        "optim": {"lr": 0.1, "use": "adamw", "fused": True, "betas": [0.9, 0.99], "clip": None},
        "run": {"password": "hunter2hunter2"},
    }
    other = {**config, "optim": {**config["optim"], "lr": 0.2}}
    for name in ("finished", "killed"):
        (tmp_path / name).mkdir()
    facts = {"placement": {"world_size": 2}, "model_summary": "a model"}
    attempt(tmp_path / "finished", 1, 0, 15, config=config, facts=facts)
    last = attempt(tmp_path / "finished", 2, 10, 20, config=config, facts=facts)
    last.summary({"loss": 0.25})
    last.end(0)
    last.close()
    attempt(tmp_path / "killed", 1, 0, 15, config=other)
    rows, differing = hparams(tmp_path)
    values, metrics, status = rows["finished/tensorboard"]
    assert values == {
        "optim.lr": 0.1, "optim.use": "adamw", "optim.fused": True, "optim.betas": "[0.9, 0.99]",
        "run.password": "***", "code.isorun": "0.1.0", "placement.world_size": 2.0,
    }  # fmt: skip
    assert differing == {"optim.lr"}
    assert (metrics["train/loss"], metrics["eval/loss"], metrics["final/loss"]) == (2, 2, 0.25)
    assert status == "STATUS_SUCCESS"
    values, metrics, status = rows["killed/tensorboard"]
    assert values["optim.lr"] == 0.2
    assert (metrics["train/loss"], metrics["eval/loss"]) == (1, 1)
    assert status == "STATUS_UNKNOWN"
    shown = read(tmp_path / "finished")
    assert texts(shown, "model_summary") == {0: "    a model"}
    assert '"lr": 0.1' in texts(shown, "config")[0]
    assert "hunter2" not in texts(shown, "config")[0]


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
