"""Signatures of the messages that the processes of a run exchange through an open port.

Everyone who reaches torch's store can read and write it. With a secret that only the run's
processes know, each message has a signature (HMAC-SHA256, RFC 2104) over the run's id, the key of
the message and its content, so that nobody else can write one, or copy one to another key or run.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Mapping

from train.exits import RetryError, UsageError

SECRET = "ISORUN_SECRET"
SECRET_FILE = "ISORUN_SECRET_FILE"
RENDEZVOUS_ID = "TORCHELASTIC_RUN_ID"
"""The id of the rendezvous, which torchrun and the node agent give to their ranks."""

_SHORTEST, _LONGEST = 16, 4096  # bytes of a secret
_UNSIGNED = b"-"


class MessageError(RetryError):
    """A message that a process of this run cannot have written."""


class Signer:
    """Signs and checks the messages of one run. It is never shown with its secret."""

    def __init__(self, secret: bytes = b"", run: str = "") -> None:
        self.signs = bool(secret)
        """Whether there is a secret. Without one, messages have no signature."""
        self._secret, self._run = secret, run.encode()

    @classmethod
    def of_environment(cls, environ: Mapping[str, str] = os.environ) -> Signer:
        """The signer of this rank. Raises UsageError as ``read_secret`` does."""
        return cls(read_secret(environ), environ.get(RENDEZVOUS_ID, ""))

    def sign(self, key: str, content: bytes, scope: str = "") -> bytes:
        """The content with its signature, an ASCII text, before it. ``scope`` tells apart messages
        with the same key."""
        return self._signature(scope, key, content) + b":" + content

    def check(self, key: str, signed: bytes, scope: str = "") -> bytes:
        """The content of what ``sign`` returned for this key and scope. Raises MessageError."""
        signature, _, content = signed.partition(b":")
        if hmac.compare_digest(signature, self._signature(scope, key, content)):
            return content
        if self.signs and signature == _UNSIGNED:
            why = f"has no signature, so a process without this run's {SECRET} wrote it"
        elif self.signs:
            why = f"has a wrong signature, so a process without this run's {SECRET} wrote it"
        else:
            why = f"is not a message of a process without {SECRET}"
        raise MessageError(
            f"The message {key!r} in the store of the run {why}. Give all processes of the run the "
            f"same {SECRET}, and check who else can reach the port (docs/security.md); then rerun."
        )

    def _signature(self, scope: str, key: str, content: bytes) -> bytes:
        if not self.signs:
            return _UNSIGNED
        parts = (self._run, scope.encode(), key.encode(), content)
        # Lengths first, so that no two lists of parts make the same text.
        text = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
        return hmac.digest(self._secret, text, hashlib.sha256).hex().encode()


def new_secret(environ: Mapping[str, str]) -> dict[str, str]:
    """The variable to add to the environment of processes that start together: a new secret, or
    none if ``environ``, which they inherit, has one."""
    if environ.get(SECRET, "").strip() or environ.get(SECRET_FILE, "").strip():
        return {}
    return {SECRET: secrets.token_hex(32)}


def read_secret(environ: Mapping[str, str]) -> bytes:
    """The secret in ISORUN_SECRET, or in the file that ISORUN_SECRET_FILE names; empty without
    both. Raises UsageError for a secret that is too short, or a file that others can read."""
    if text := environ.get(SECRET, "").strip():
        return _long_enough(os.fsencode(text), f"{SECRET} (environment)")
    if path := environ.get(SECRET_FILE, "").strip():
        return _long_enough(_read_file(path), f"The secret in {path!r} ({SECRET_FILE})")
    return b""


def _read_file(path: str) -> bytes:
    try:
        # A FIFO would block here.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise UsageError(f"{SECRET_FILE} is {path!r}, which is not a file; name a file.")
            # Files of a Kubernetes Secret belong to root and to the group of the pod.
            if found.st_mode & (0o037 if found.st_uid == 0 != os.geteuid() else 0o077):
                raise UsageError(
                    f"{SECRET_FILE} is {path!r}, which other users can access (mode "
                    f"{stat.S_IMODE(found.st_mode):04o}); run `chmod 600 {path}`."
                )
            return file.read(_LONGEST + 1).strip()
    except OSError as error:
        raise UsageError(
            f"{SECRET_FILE} is {path!r}, which cannot be read ({error.strerror}); correct it."
        ) from None


def _long_enough(secret: bytes, what: str) -> bytes:
    if not _SHORTEST <= len(secret) <= _LONGEST:
        raise UsageError(
            f"{what} must have {_SHORTEST} to {_LONGEST} bytes, but has {len(secret)}; make one by "
            "`openssl rand -hex 32`."
        )
    return secret
