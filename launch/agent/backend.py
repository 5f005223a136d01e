"""Keeps the state of torch's rendezvous in its store, as signed plain data."""

from __future__ import annotations

import pickle
import secrets
from typing import Any

from torch._C._distributed_c10d import Store
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousStateError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousBackend

from launch.agent.state import StateError, from_data, to_data
from launch.contract import MessageError, Messages, Signer, unreadable

_EMPTY = "none"
"""The text of the key before there is a state."""


class ForeignStateError(RendezvousStateError):
    """The state is one that no agent of this run can have written now; the text is a sentence."""


class OtherNumbersError(Exception):
    """The first node of the rendezvous was started with another smallest or largest number of
    nodes: the arguments."""


class SignedBackend(RendezvousBackend):
    """What torch's rendezvous reads its state from, and writes it to.

    torch passes the state as a pickle and expects one. Both are made in this process: what other
    processes have written is decoded from JSON. Each state has a number, one higher than that of
    the state before, so that a copy of an earlier state is noticed; and its signature holds for
    one name, which the first agent draws, so that a copy from an earlier start is noticed, too.
    """

    name = "c10d"

    def __init__(self, store: Store, signer: Signer, run_id: str, nodes: tuple[int, int]) -> None:
        """``nodes`` are the smallest and the largest number of nodes. With other numbers, torch
        would let a node join, but the round would never be complete for the nodes before it.

        Raises ForeignStateError if the name is not one of this run, and OtherNumbersError.
        """
        self._store = store
        self._key = f"isorun/rendezvous/{run_id}"
        self._number = 0
        """That of the newest state that torch has got."""
        start = f"{self._key}/start"
        names = Messages(store, signer)
        mine = names.encode(start, [secrets.token_hex(16), *nodes])
        found = self._compare_set(start, "", mine)
        try:
            match names.decode(start, found.encode()):
                case [str(name), int(fewest), int(most)]:
                    self._messages = Messages(store, signer, name)
                case _:
                    raise unreadable(start)
        except MessageError as error:
            raise ForeignStateError(str(error)) from None
        if (fewest, most) != nodes:
            raise OtherNumbersError(fewest, most)
        self._read()

    def get_state(self) -> tuple[bytes, str] | None:
        """The state and its token, the text in the store."""
        return self._accept(self._read())

    def set_state(self, state: bytes, token: Any = None) -> tuple[bytes, str, bool] | None:
        """Replaces the state that has the token; see torch's base class for what it returns."""
        number = self._number + 1
        data = to_data(pickle.loads(state))  # from this process
        text = self._messages.encode(self._key, [number, data])
        found = self._compare_set(self._key, str(token) if token else _EMPTY, text)
        if found == text:
            self._number = number
            return state, text, True
        accepted = self._accept(found)
        return (*accepted, False) if accepted else None

    def peek(self) -> Any:
        """torch's object of the state that is in the store now, or None, without handing it to
        torch: another thread may be about to hand it an earlier one."""
        return self._decode(self._read())[1]

    def _accept(self, text: str) -> tuple[bytes, str] | None:
        number, state = self._decode(text)
        if number < self._number:
            raise ForeignStateError(
                "The state of the rendezvous was replaced by an earlier one, which no node of this "
                "run does. Check who can reach its port (docs/security.md), then rerun."
            )
        self._number = number
        return None if state is None else (pickle.dumps(state), text)

    def _decode(self, text: str) -> tuple[int, Any]:
        if text == _EMPTY:
            return 0, None
        try:
            match self._messages.decode(self._key, text.encode()):
                case [int(number), data] if number > 0:
                    return number, from_data(data)
            raise unreadable(self._key)
        except StateError:
            raise ForeignStateError(str(unreadable(self._key))) from None
        except MessageError as error:
            raise ForeignStateError(str(error)) from None

    def _read(self) -> str:
        """The text of the state; a plain read would wait for a key that is not set."""
        return self._compare_set(self._key, "", _EMPTY)

    def _compare_set(self, key: str, expected: str, desired: str) -> str:
        """The text under a key after it was replaced if it was ``expected``, or not set and that
        is empty."""
        try:
            found: bytes = self._store.compare_set(key, expected, desired)
        except (ValueError, RuntimeError) as error:
            raise RendezvousConnectionError("The store cannot be reached.") from error
        return found.decode(errors="replace")
