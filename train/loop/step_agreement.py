"""What the ranks agree on in each step, in one small exchange beside the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from train.distributed.collectives import Collectives
from train.loop.checkpointing import Checkpointing
from train.loop.triggers import Triggers
from train.process.stop import StopRequest


class Agreed(NamedTuple):
    """What all ranks know of a step before its first gradient; the same on all ranks."""

    global_count: int
    """Units of the global batch; the loss is divided by it."""
    stop: bool
    """Whether any rank was asked to stop. Then the step is not completed."""
    save: bool
    """Whether rank 0's clock asks for a checkpoint after the step."""


class StepAgreement:
    """Exchanges counts and requests of the ranks."""

    def __init__(
        self,
        collectives: Collectives,
        stop: StopRequest,
        triggers: Triggers,
        checkpointing: Checkpointing,
        beat: Callable[[str], None],
    ) -> None:
        self._collectives, self._stop, self._triggers = collectives, stop, triggers
        self._checkpointing, self._beat = checkpointing, beat

    def start(self, count: int) -> Callable[[], Agreed]:
        """Sends this rank's ``count`` and requests; call the result to wait for the other ranks.

        Waiting at once would cost each step as much time as the slowest rank is behind.
        """
        time_to_save = self._collectives.rank == 0 and self._triggers.time_to_save()
        checkpointing = self._checkpointing
        pending = self._collectives.start_all_reduce_ints(
            [
                count,
                self._stop.requested,
                time_to_save,
                checkpointing.failed,
                checkpointing.written,
            ]
        )

        def wait() -> Agreed:
            self._beat("waiting for other ranks")
            global_count, stop, save, failed, written = pending()
            # A failure, or a commit that all ranks know, is reported now, not at the next save.
            if failed or written == self._collectives.world_size:
                checkpointing.wait()
            return Agreed(global_count, stop > 0, save > 0)

        return wait
