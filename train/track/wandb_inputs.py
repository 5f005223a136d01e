"""Declares the artifacts that an attempt has started from as inputs of its W&B run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

from train.exits import first_line

_log = logging.getLogger("train")


class RunInputs:
    """A thread, since W&B's client may wait long for the server. Never makes the training fail."""

    def __init__(self, wandb_run: Any, artifacts: Sequence[str]) -> None:
        """``artifacts``: ``entity/project/name:version``."""
        self._thread = threading.Thread(
            target=self._declare, args=(wandb_run, artifacts), name="wandb-inputs", daemon=True
        )
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Waits until W&B has them, at most so long."""
        self._thread.join(seconds)

    def _declare(self, wandb_run: Any, artifacts: Sequence[str]) -> None:
        for name in artifacts:
            try:
                wandb_run.use_artifact(name)
            except BaseException as error:  # wandb raises KeyboardInterrupt and SystemExit as well
                _log.warning(
                    "W&B does not show %s as an input of the run (%s).", name, first_line(error)
                )
