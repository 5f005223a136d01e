"""Waits for Kubeflow Trainer, whose webhook refuses a TrainJob until the trainer's cache has its
TrainingRuntime, a moment after the API server has it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from launch.contract import UsageError

SECONDS = 60.0
"""How long Kubeflow Trainer may take to notice a TrainingRuntime."""
POLL = 1.0
T = TypeVar("T")


def when_noticed(create: Callable[[], T], is_unnoticed: Callable[[str], object]) -> T:
    """Calls ``create``, which creates a TrainJob, until the text of its UsageError is not one
    that ``is_unnoticed``; returns what it returns. Raises what ``create`` raises."""
    until = time.monotonic() + SECONDS
    while True:
        try:
            return create()
        except UsageError as error:
            if not is_unnoticed(str(error)) or time.monotonic() > until:
                raise
        time.sleep(POLL)
