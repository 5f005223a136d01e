"""Where the nodes meet: torch's rendezvous, and what it does not say by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from launch.agent.endpoint import notice_silence
from launch.agent.options import Options
from launch.contract import RetryError, UsageError

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler

_PASSED = "isorun/preflight-passed"


class ClosedError(RetryError):
    """The other nodes have ended what this one wanted to take part in."""

    def __init__(self) -> None:
        super().__init__(
            "The other nodes have ended the run, or given it up; their own messages say why."
        )


def meet(options: Options, suffix: str = "") -> RendezvousHandler:
    """torch's rendezvous. Raises RetryError where its store cannot be reached, and UsageError for
    settings that torch does not take."""
    from torch.distributed.elastic.rendezvous import (
        RendezvousError,
        RendezvousParameters,
        registry,
    )

    # Nodes that are lost are missed after some seconds.
    settings: dict[str, str | int] = {
        "timeout": int(options.rdzv_timeout),
        "join_timeout": int(options.rdzv_timeout),
        "last_call_timeout": 1,
        "keep_alive_interval": 1,
        "keep_alive_max_attempt": 5,
    }
    if options.node_rank is not None:
        settings["is_host"] = int(options.node_rank == 0)
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=options.endpoint,
        run_id="-".join(filter(None, (options.rdzv_id, suffix))),
        min_nodes=options.min_nodes,
        max_nodes=options.max_nodes,
        local_addr=options.local_addr,
        **{**settings, **options.rdzv_conf},
    )
    try:
        made = registry.get_rendezvous_handler(parameters)
    except RendezvousError as error:
        raise RetryError(
            f"The rendezvous at {options.endpoint} failed ({error.__cause__ or error}); see "
            "whether node 0 runs there and the port is free."
        ) from error
    except (TypeError, ValueError) as error:
        if not options.rdzv_conf:
            raise
        raise UsageError(f"--rdzv-conf is not what torch takes: {error}; correct it.") from None
    notice_silence(options.port)
    return made


def why_not_met(options: Options, error: Exception) -> str:
    """A failed rendezvous in words."""
    from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

    if isinstance(error, RendezvousTimeoutError):
        wanted = f"{options.min_nodes}" + (" or more" if options.elastic else "")
        return (
            f"Not all of {wanted} nodes came to the rendezvous at {options.endpoint} within "
            f"--rdzv-timeout, {options.rdzv_timeout:g} s; see which node was not started, or "
            "cannot reach it."
        )
    return (
        f"The node that keeps the rendezvous at {options.endpoint} is gone or cannot be reached "
        "any more; start the run again to go on from its last checkpoint."
    )


def note_passed(meeting: RendezvousHandler) -> None:
    """Leaves word for nodes that come later: these have been looked at, and nothing is wrong."""
    _store(meeting).set(_PASSED, "")


def have_passed(meeting: RendezvousHandler) -> bool:
    """Whether such word was left. Raises RetryError where its keeper is gone."""
    try:
        return bool(_store(meeting).check([_PASSED]))
    except RuntimeError as error:
        raise ClosedError from error


def round_of(meeting: RendezvousHandler) -> int | None:
    """How often the nodes have met before: the same for all of them until they meet again. None
    where torch keeps it elsewhere than the versions known here do."""
    state = getattr(getattr(meeting, "_state_holder", None), "state", None)
    return getattr(state, "round", None)


def _store(meeting: RendezvousHandler) -> Any:
    """That which all meetings of these nodes have in common; torch hands out parts of it only."""
    return cast("Any", meeting)._store
