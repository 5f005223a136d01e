"""The system metrics of a node without rank 0, in the W&B run of rank 0 (``track.wandb_nodes``).

W&B's shared mode has one primary, which is rank 0; others add the metrics of their machines.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from train.distributed.world import World
from train.track.background import Background
from train.track.sinks import RunInfo
from train.track.track_config import TrackConfig
from train.track.wandb_shared import NO_SHARED_MODE, has_shared_mode, node_label
from train.track.wandb_sink import WandbSink, wandb_mode

_log = logging.getLogger("train")


class WandbNode(WandbSink):
    """Sends system metrics, and nothing else."""

    name = "W&B on this node"

    def __init__(
        self, run: RunInfo, config: TrackConfig, rank: int, *, init_seconds: float = 20.0
    ) -> None:
        super().__init__(run, config, init_seconds=init_seconds)
        self.rank = rank
        self._run: Any = None

    def _open(self) -> str | None:
        import wandb

        self._refuse_links()
        user = wandb.setup(settings=wandb.Settings(silent=True)).settings
        mode = wandb_mode(self.config.wandb, user.mode, user.base_url, user.api_key)
        if mode == "disabled":
            return None
        if mode == "offline":
            raise RuntimeError("offline, W&B has the system metrics of the first node only")
        if not has_shared_mode():
            raise RuntimeError(NO_SHARED_MODE)
        # Not in wandb/ itself, where each directory is an attempt of rank 0.
        directory = self.run.directory / "wandb" / "nodes" / node_label(self.rank)
        directory.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            **self._place(),
            dir=str(directory),
            mode="shared",
            settings=self._settings(
                x_label=node_label(self.rank), x_primary=False, x_update_finish_state=False
            ),
        )
        return None

    def close(self) -> None:
        """Ends this node's part; the run goes on."""
        import wandb

        if self._run is not None:
            self._run.finish()
        wandb.teardown()


def stands_for_its_node(world: World, hosts: Sequence[str]) -> bool:
    """Whether this rank sends the metrics of its node: the first one there, unless it is rank 0,
    whose W&B does. ``hosts``: the host of each rank."""
    first_here = hosts.index(hosts[world.rank]) == world.rank
    first_of_launcher = world.local_rank == 0 and not world.local_rank_guessed
    return world.rank > 0 and (first_here or first_of_launcher)


class NodeMetrics:
    """Runs a ``WandbNode`` in the background. A failure is one warning in this rank's log."""

    def __init__(
        self, run: RunInfo, config: TrackConfig, rank: int, *, close_seconds: float = 20.0
    ) -> None:
        warn = partial(_log.warning, "%s")
        self._close_seconds, self._started = close_seconds, False
        self._background = Background(WandbNode(run, config, rank), _log.info, warn)

    def start(self, step: int) -> None:
        """Called after each step. The first call starts the thread, whose imports would delay the
        start of the run."""
        if not self._started:
            self._started = True
            self._background.put("advance", step)

    def close(self) -> None:
        """Waits for W&B up to ``close_seconds``."""
        if not self._background.close(self._close_seconds):
            _log.warning(
                "Timed out after %g s waiting for W&B to send this node's system metrics.",
                self._close_seconds,
            )
