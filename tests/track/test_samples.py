"""samples/: what a task reports, kept in the run directory with bounds."""

import base64
import io
import itertools

import numpy as np
import pytest

from tests.track.conftest import run_info
from train.track import samples
from train.track.samples import SamplesSink, read_samples, sample_steps, too_many


def test_texts_and_images_come_back(tmp_path, track):
    image = np.zeros((3, 4, 6), dtype=np.float32)
    image[0, 1, 2] = 1.0
    tracker = track(None, config={"tensorboard": False, "wandb": "disabled"})
    tracker.report(7, {"sample": "a text", "drawn": image})
    tracker.close()
    assert sample_steps(tmp_path) == [7]
    text, drawn = read_samples(tmp_path, 7)["items"]
    assert (text["name"], text["text"]) == ("sample", "a text")
    pil = pytest.importorskip("PIL.Image")
    decoded = pil.open(io.BytesIO(base64.b64decode(drawn["image"])))
    assert decoded.size == (6, 4)
    assert decoded.getpixel((2, 1)) == (255, 0, 0)
    assert decoded.getpixel((1, 2)) == (0, 0, 0)


def test_a_resumed_attempt_removes_the_steps_that_it_repeats(tmp_path):
    sink = SamplesSink(run_info(tmp_path))
    for step in (10, 20, 30):
        sink.report(step, {"sample": f"first {step}"})
    again = SamplesSink(run_info(tmp_path, attempt=2, start_step=20))
    again.open()
    assert sample_steps(tmp_path) == [10, 20]
    again.report(20, {"other": "more"})
    names = [item["name"] for item in read_samples(tmp_path, 20)["items"]]
    assert names == ["sample", "other"]


def test_what_is_kept_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "STEPS", 5)
    sink = SamplesSink(run_info(tmp_path))
    items = {f"text {number}": "x" * 100_000 for number in range(40)}
    sink.report(1, items | {"large": np.zeros((3, 2000, 1000), dtype=np.uint8)})
    kept = read_samples(tmp_path, 1)
    assert (len(kept["items"]), kept["left_out"]) == (samples.ITEMS, 9)
    assert len(kept["items"][0]["text"]) == samples.TEXT
    sink.report(1, {"text 0": np.zeros((3, 2000, 1000), dtype=np.uint8)})
    first = read_samples(tmp_path, 1)["items"][0]
    assert max(first["width"], first["height"]) <= samples.SIDE
    for step in range(2, 40):
        sink.report(step, {"sample": "x"})
    steps = sample_steps(tmp_path)
    assert len(steps) == 5
    assert (steps[0], steps[-1]) == (1, 39)


def test_the_steps_that_remain_are_spread(monkeypatch):
    monkeypatch.setattr(samples, "STEPS", 10)
    kept = []
    for step in range(0, 1000, 10):
        kept.append(step)
        kept = [each for each in kept if each not in set(too_many(kept))]
    gaps = [after - before for before, after in itertools.pairwise(kept)]
    assert kept[0] == 0
    assert kept[-1] == 990
    assert len(kept) == 10
    assert max(gaps) <= 4 * 110


def test_the_directory_is_not_written_through_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").symlink_to(tmp_path / "elsewhere")
    sink = SamplesSink(run_info(tmp_path / "run"))
    with pytest.raises(OSError, match="symbolic link"):
        sink.report(1, {"sample": "x"})
    assert not list((tmp_path / "elsewhere").iterdir())
