"""samples/: the texts and images that a task reports, a file per step, for `isorun report`.

The directory is bounded: of many steps some are kept, evenly spread, and long texts and large
images are reduced.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from base64 import b64encode
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from train.files import refuse_link, replace_bytes
from train.json_files import Fields, has_fields, is_count, read_object
from train.track.sinks import RunInfo, Sink

SAMPLES = "samples"
STEPS = 100
"""How many steps are kept."""
ITEMS = 32
"""How many texts and images of a step are kept."""
TEXT = 20_000
"""Characters of a text that are kept."""
SIDE = 512
"""The largest width and height of an image, in pixels."""
LIMIT = 32 << 20
"""The largest size of a file that is read, in bytes."""

_NAME = re.compile(r"step-(\d{12})\.json")
_FIELDS: Fields = {"step": int, "items": list}
_ITEM: Fields = {"name": str}


class SamplesSink(Sink):
    """Writes samples/step-*.json. An attempt removes the steps that it repeats."""

    name = "samples"

    def __init__(self, run: RunInfo) -> None:
        self.run = run
        self._directory = run.directory / SAMPLES

    def open(self) -> None:
        """Removes the samples of steps that this attempt repeats."""
        for step in sample_steps(self.run.directory):
            if step > self.run.start_step:
                _path(self._directory, step).unlink(missing_ok=True)

    def report(self, step: int, items: Mapping[str, Any]) -> None:
        """Writes the texts and images of a step; several reports of one step are merged."""
        refuse_link(self._directory)
        if not self._directory.is_dir():
            self._directory.mkdir()  # never the run directory, if it was moved
        before = read_samples(self.run.directory, step) or {"items": [], "left_out": 0}
        kept = {item["name"]: item for item in before["items"]}
        kept |= {name[:200]: _item(name[:200], item) for name, item in items.items()}
        values = {
            "step": step,
            "attempt": self.run.attempt,
            "time": self.logged_at,
            "items": list(kept.values())[:ITEMS],
            "left_out": max(0, len(kept) - ITEMS),
        }
        replace_bytes(_path(self._directory, step), json.dumps(values).encode())
        for old in too_many(sample_steps(self.run.directory)):
            _path(self._directory, old).unlink(missing_ok=True)


def too_many(steps: list[int]) -> Iterator[int]:
    """The steps to remove so that ``STEPS`` remain: those closest to their neighbours, never the
    first or the last."""
    steps = sorted(steps)
    while len(steps) > STEPS:
        gaps = [after - before for before, after in zip(steps, steps[2:], strict=False)]
        yield steps.pop(gaps.index(min(gaps)) + 1)


def sample_steps(directory: Path) -> list[int]:
    """The steps of a run directory that have samples, ascending. Raises OSError, for a link in
    place of the directory as well."""
    folder = directory / SAMPLES
    refuse_link(folder)
    if not folder.is_dir():
        return []
    names = (_NAME.fullmatch(entry) for entry in os.listdir(folder))  # noqa: PTH208
    return sorted(int(name[1]) for name in names if name)


def read_samples(directory: Path, step: int) -> dict[str, Any] | None:
    """The samples of a step: in ``items`` objects with ``name`` and ``text``, or ``image`` (a PNG
    in base64), ``width`` and ``height``. None where there are none, or they are damaged."""
    try:
        values = read_object(_path(directory / SAMPLES, step), _FIELDS, limit=LIMIT)
    except (OSError, ValueError):
        return None
    items = [item for item in values["items"][:ITEMS] if has_fields(item, _ITEM)]
    left_out = values.get("left_out")
    return {**values, "items": items, "left_out": left_out if is_count(left_out) else 0}


def _path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:012d}.json"


def _item(name: str, item: Any) -> dict[str, Any]:
    if isinstance(item, str):
        shown = {"text": item[:TEXT]}
        return {"name": name, **shown, "characters": len(item)}
    every = max(1, -(-max(item.shape[1:]) // SIDE))
    small = item[:, ::every, ::every]
    _, height, width = small.shape
    image = b64encode(png(small.transpose(1, 2, 0).tobytes(), width, height)).decode()
    return {"name": name, "image": image, "width": width, "height": height, "every": every}


def png(pixels: bytes, width: int, height: int) -> bytes:
    """A PNG of 8-bit RGB pixels, row by row."""
    row = 3 * width
    lines = b"".join(b"\0" + pixels[at : at + row] for at in range(0, row * height, row))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
