"""Messages between processes through a store: JSON with a signature, under a key."""

from __future__ import annotations

import json
import time
from typing import Any

from torch._C._distributed_c10d import Store

from train.signing import MessageError, Signer

_POLL = 0.02  # seconds


class Messages:
    """The messages of a store. ``scope`` tells apart stores that have the same keys, as the prefix
    of a PrefixStore does: a signature holds for one scope."""

    def __init__(self, store: Store, signer: Signer, scope: str = "") -> None:
        self.store, self.signer, self._scope = store, signer, scope

    def publish(self, key: str, value: Any = None) -> None:
        """Stores a value that JSON can represent."""
        self.store.set(key, self.encode(key, value))

    def read(self, key: str) -> Any:
        """The value under a key that is set. Raises MessageError where no process of this run has
        written it."""
        return self.decode(key, self.store.get(key))

    def is_there(self, key: str) -> bool:
        """Whether a process of this run has published a value under the key; a message of anybody
        else does not count."""
        if not self.store.check([key]):
            return False
        try:
            self.read(key)
        except MessageError:
            return False
        return True

    def wait_for(self, key: str, deadline: float) -> bool:
        """Whether the key is set by ``deadline``, in monotonic seconds."""
        return wait_for_key(self.store, key, deadline)

    def encode(self, key: str, value: Any) -> str:
        """The text to store under the key."""
        content = json.dumps(value, separators=(",", ":")).encode()
        return self.signer.sign(key, content, self._scope).decode()

    def decode(self, key: str, text: bytes) -> Any:
        """The value of a text that was stored under the key. Raises MessageError."""
        content = self.signer.check(key, text, self._scope)
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise unreadable(key) from None


def unreadable(key: str) -> MessageError:
    """The error for a message with another content than this program writes."""
    return MessageError(
        f"The message {key!r} in the store of the run has a wrong format, so another program wrote "
        "it. Check who can reach the port (docs/security.md), and that all nodes have the same "
        "version of isorun; then rerun."
    )


def wait_for_key(store: Store, key: str, deadline: float) -> bool:
    """Whether the key is set by ``deadline``, in monotonic seconds. Polls, because a wait inside
    torch blocks the signals and the other threads of this process."""
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True
