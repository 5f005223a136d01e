"""Shared by the tests of the built-in tasks: a task from the fields that a test cares about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from train.tasks.text.task import TextTask


def small_text_task(
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    task: dict[str, Any] | None = None,
    seed: int = 1,
) -> TextTask:
    """A text task with a model small enough for a test."""
    tiny = {"layers": 2, "heads": 2, "width": 16} | (model or {})
    return TextTask(
        SimpleNamespace(
            run=SimpleNamespace(seed=seed),
            task=TextTask.Options(**(task or {})),
            model=TextTask.Model(**tiny),
            data=TextTask.Data(**({"context": 16} | (data or {}))),
        )
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads do not speed up such small models, and wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_text_task() -> Callable[..., TextTask]:
    return small_text_task


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    """Twelve short documents with characters of one to four bytes; their paths as a glob."""
    for n in range(12):
        text = f"Document {n}: " + "naïve café — 😀 words " * (n % 5) + "x" * n
        (tmp_path / f"{n:02}.txt").write_text(text, encoding="utf-8")
    return [str(tmp_path / "*.txt")]
