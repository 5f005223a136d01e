"""torch's rendezvous of the nodes, with settings and errors of our own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

from launch.agent.arguments import as_nnodes
from launch.agent.keepalive import set_keepalive
from launch.agent.options import AgentOptions
from launch.agent.quiet_torch import import_torch
from launch.contract import (
    RetryError,
    Signer,
    UsageError,
    first_line,
    listed,
    log,
    reported_wait,
)

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler

_PASSED = "isorun/preflight-passed"
_WAIT = 25.0  # seconds for other nodes to set what each sets at once when a round begins


class ClosedError(RetryError):
    """The other nodes have closed the rendezvous that this node wants to join."""

    def __init__(self) -> None:
        super().__init__(
            "The other nodes have already ended the run. Check their logs for the reason."
        )


def join(
    options: AgentOptions, suffix: str = "", former: RendezvousHandler | None = None
) -> RendezvousHandler:
    """The rendezvous of all nodes; ``suffix`` tells apart several of one run. ``former`` is one
    that this process has joined at the same address.

    Raises RetryError if its store cannot be reached or is not of this run, and UsageError for
    settings that torch rejects, or another number of nodes than that of the nodes before.
    """
    import_torch()
    from torch.distributed.elastic.rendezvous import (
        RendezvousError,
        RendezvousParameters,
        RendezvousStateError,
    )
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

    from launch.agent.backend import OtherNumbersError, SignedBackend
    from launch.agent.store import open_store, open_store_of_ranks

    # A node that sends no keep-alive for 5 s is removed.
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
        of_node_0 = f"the store of node 0 at {options.endpoint}"
        with waiting_for(lambda: of_node_0, f"{options.endpoint} answers"):
            store = open_store(options, parameters, _store(former) if former else None)
            signer = Signer(options.secret, parameters.run_id)
            nodes = options.min_nodes, options.max_nodes
            backend = SignedBackend(store, signer, parameters.run_id, nodes)
            handler = create_handler(store, backend, parameters)
    except OtherNumbersError as error:
        raise UsageError(
            f"--nnodes is {as_nnodes(*nodes)}, but the run that uses {options.endpoint} has "
            f"--nnodes {as_nnodes(*error.args)}; give all nodes of a run the same number, and "
            "another run on these hosts another --rdzv-endpoint."
        ) from None
    except RendezvousStateError as error:
        raise RetryError(str(error)) from None
    except (OSError, RendezvousError, RuntimeError) as error:
        why = first_line(error.__cause__ or error)
        raise RetryError(
            f"The rendezvous at {options.endpoint} failed ({why}). Check that node 0 runs "
            "there and that no other process uses the port."
        ) from error
    except (TypeError, ValueError) as error:
        if not options.rdzv_conf:
            raise
        raise UsageError(f"torch rejects --rdzv-conf: {error}; correct it.") from None
    # torch's own would listen at all addresses.
    cast("Any", handler)._create_tcp_store_server = open_store_of_ranks
    set_keepalive(options.port)
    store.set_timeout(timedelta(seconds=_WAIT))
    return handler


def waiting_for(describe: Callable[[], str], over: str) -> AbstractContextManager[None]:
    """Surrounds a wait for other nodes, which is logged while it lasts."""
    return reported_wait(describe, log, lambda: over)


def missing_nodes(options: AgentOptions, handler: RendezvousHandler) -> str:
    """How many nodes are missing for the next round, and which have joined; whether this node must
    wait for its end if a round without it is complete. Asks no other process."""
    at = f"at the rendezvous {options.endpoint}"
    state = getattr(getattr(handler, "_state_holder", None), "state", None)
    if state is None:  # this version of torch keeps it elsewhere
        return f"other nodes {at}"
    joined = list(state.participants)
    if state.complete and getattr(handler, "_this_node", None) in joined:
        return f"the addresses and ranks of the other nodes {at}"
    if state.complete:
        return f"the {len(joined)} nodes that run {at} to let this one join"
    missing = max(1, options.min_nodes - len(joined))
    names = listed([f"{node.addr}" for node in joined], 8)
    return f"{missing} of {options.min_nodes} nodes {at} (joined: {names or 'none'})"


def forget_round(handler: RendezvousHandler) -> None:
    """Makes the next round exchange the address of its rank 0. torch 2.13 keeps that of the round
    before on each node that does not become rank 0 itself."""
    if getattr(handler, "_bootstrap_store_info", None) is not None:
        cast("Any", handler)._bootstrap_store_info = None


def failure_of(options: AgentOptions, error: Exception) -> str:
    """The message for a rendezvous that failed with ``error``."""
    from torch.distributed.elastic.rendezvous import RendezvousStateError, RendezvousTimeoutError

    if isinstance(error, RendezvousStateError):
        return str(error)
    if isinstance(error, RendezvousTimeoutError):
        wanted = f"{options.min_nodes}" + (" or more" if options.elastic else "")
        return (
            f"Timed out after {options.rdzv_timeout:g} s (--rdzv-timeout) waiting for {wanted} "
            f"nodes at the rendezvous {options.endpoint}. Check which node was not started or "
            "cannot connect."
        )
    return f"{store_lost(options)}. Rerun to resume from the last checkpoint."


def store_lost(options: AgentOptions) -> str:
    """The error of a node that cannot reach the rendezvous any more; no full stop."""
    return f"The node that hosts the rendezvous at {options.endpoint} is gone or cannot be reached"


def note_preflight_passed(handler: RendezvousHandler) -> None:
    """Stores, for nodes that join later, that these nodes have passed the preflight."""
    _store(handler).set(_PASSED, "")


def preflight_passed(handler: RendezvousHandler) -> bool:
    """Whether other nodes have passed the preflight. Raises ClosedError if the store is gone."""
    try:
        return bool(_store(handler).check([_PASSED]))
    except RuntimeError as error:
        raise ClosedError from error


def round_of(handler: RendezvousHandler) -> int | None:
    """The number of completed rendezvous rounds, the same on all nodes. None if this version of
    torch keeps it elsewhere than the known ones."""
    state = getattr(getattr(handler, "_state_holder", None), "state", None)
    return getattr(state, "round", None)


def has_started(handler: RendezvousHandler, after: int | None) -> bool:
    """Whether a later round than ``after`` is complete with this node in it, so that the other
    nodes start their ranks, even if torch has not noticed it here. False if the store is gone or
    has no valid state, or if this version of torch keeps the state elsewhere than the known ones.
    """
    from torch.distributed.elastic.rendezvous import RendezvousError

    try:
        state = cast("Any", handler)._state_holder._backend.peek()
        return bool(
            state
            and state.complete
            and not state.closed
            and state.round != after
            and cast("Any", handler)._this_node in state.participants
        )
    except (AttributeError, RendezvousError):
        return False


def _store(handler: RendezvousHandler) -> Any:
    """The store that all rounds share; torch's public interface has only parts of it."""
    return cast("Any", handler)._store
