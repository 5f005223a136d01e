"""The state of torch's rendezvous as plain data.

torch pickles the state, and unpickles what it finds in the store: whoever reaches the store would
run code in each agent. Here the state is a list of numbers, texts and times, and is built again
field by field, with each type checked.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _RendezvousState

Node = Any
"""torch's _NodeDesc: address, process id and a number within the process."""
K = TypeVar("K")

_FIELDS = (
    "round", "complete", "deadline", "closed", "participants", "wait_list", "redundancy_list",
    "last_heartbeats",
)  # fmt: skip
_LARGEST = 2**53  # numbers above it differ between JSON readers


class StateError(ValueError):
    """Data that is not a state of the rendezvous."""


def to_data(state: _RendezvousState) -> dict[str, Any]:
    """The state as what JSON can represent. Raises StateError if this version of torch has other
    fields than the known ones."""
    if set(vars(state)) != set(_FIELDS):
        raise StateError(f"its fields are {', '.join(sorted(vars(state)))}")
    return {
        "round": state.round,
        "complete": state.complete,
        "deadline": state.deadline and state.deadline.isoformat(),
        "closed": state.closed,
        "participants": [[_node_data(node), rank] for node, rank in state.participants.items()],
        "wait_list": [_node_data(node) for node in state.wait_list],
        "redundancy_list": [_node_data(node) for node in state.redundancy_list],
        "last_heartbeats": [
            [_node_data(node), time.isoformat()] for node, time in state.last_heartbeats.items()
        ],
    }


def from_data(data: Any) -> _RendezvousState:
    """The state from what ``to_data`` returned. Raises StateError for anything else."""
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _RendezvousState

    if not isinstance(data, dict) or set(data) != set(_FIELDS):
        raise StateError("it has other fields")
    state = _RendezvousState()
    state.round = _number(data["round"])
    state.complete, state.closed = _flag(data["complete"]), _flag(data["closed"])
    state.deadline = None if data["deadline"] is None else _time(data["deadline"])
    state.participants = _by_node(data["participants"], _number)
    state.wait_list = {_node(value) for value in _list(data["wait_list"])}
    state.redundancy_list = {_node(value) for value in _list(data["redundancy_list"])}
    state.last_heartbeats = _by_node(data["last_heartbeats"], _time)
    named = state.participants.keys() | state.wait_list | state.redundancy_list
    if not named <= state.last_heartbeats.keys():  # torch looks each of them up there
        raise StateError("a node has no heartbeat")
    return state


def _node_data(node: Node) -> list[Any]:
    return [node.addr, node.pid, node.local_id]


def _node(value: Any) -> Node:
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _NodeDesc

    match value:
        case [str(address), pid, local_id] if 0 < len(address) <= 255:
            return _NodeDesc(address, _number(pid), _number(local_id))
    raise StateError("a node is not an address and two numbers")


def _by_node(value: Any, read: Callable[[Any], K]) -> dict[Node, K]:
    found = {}
    for pair in _list(value):
        match pair:
            case [node, of_node]:
                found[_node(node)] = read(of_node)
            case _:
                raise StateError("a pair is expected")
    return found


def _list(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    raise StateError("a list is expected")


def _number(value: Any) -> int:
    if type(value) is int and 0 <= value <= _LARGEST:
        return value
    raise StateError("a whole number is expected")


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise StateError("true or false is expected")


def _time(value: Any) -> datetime:
    if isinstance(value, str):
        try:
            time = datetime.fromisoformat(value)
        except ValueError:
            time = None
        if time is not None and time.tzinfo is not None:
            return time
    raise StateError("a time with its zone is expected")
