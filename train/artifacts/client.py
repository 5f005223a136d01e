"""The process that reads artifacts from W&B, with W&B's own client.

It is a process of its own because the client waits without a limit for some servers, and because
its settings, hooks and background service must not become those of the training. It gets one JSON
object per line and answers with one per line:

1. ``{"name": "entity/project/name:alias"}``: what the artifact is, and its list of files.
2. ``{"download": [names], "to": directory, "limit": bytes}``: downloads these files. A line for
   each, then ``{"done": true}``. No file gets larger than the limit.

An answer ``{"error": kind, "text": text}`` is the last one; see ``ERRORS``. It ends with its
standard input.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import queue
import resource
import socket
import sys
import threading
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

ERRORS = ("credentials", "missing", "forbidden", "damaged", "disk", "unreachable")
"""There are none, or they are refused; no such artifact; no rights; a file is not what the artifact
lists; the local disk; anything else."""
SECONDS = 15
"""How long W&B may take for one answer."""
_TRIES = 3
_BLOCK = 1 << 20


class _FailedError(Exception):
    def __init__(self, kind: str, error: object) -> None:
        super().__init__(str(error).strip().partition("\n")[0].rstrip("."))
        self.kind = kind


def main() -> None:
    """Serves one artifact; does not return."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what W&B's client prints is no answer
    socket.setdefaulttimeout(SECONDS)  # the client downloads without a limit

    def reply(**values: Any) -> None:
        print(json.dumps(values), file=replies, flush=True)

    try:
        _serve(_requests(), reply)
    except _FailedError as error:
        reply(error=error.kind, text=str(error))
    except Exception as error:
        reply(error=_kind(error), text=_FailedError("", f"{type(error).__name__}: {error}").args[0])
    os._exit(0)  # without the hooks of W&B's client, which may wait


def _requests() -> Iterator[dict[str, Any]]:
    """The lines of standard input; the process ends with it, also during a download."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield json.loads(lines.get())


def _serve(requests: Iterator[dict[str, Any]], reply: Any) -> None:
    import wandb

    _refuse_short_bodies()
    reply(started=True)
    artifact = _find(wandb, next(requests)["name"])
    manifest = artifact.manifest
    collection = str(artifact.name).partition(":")[0]
    reply(
        name=f"{artifact.entity}/{artifact.project}/{collection}:{artifact.version}",
        type=artifact.type,
        metadata=artifact.metadata,
        files={
            str(name): {"size": entry.size, "ref": entry.ref}
            for name, entry in manifest.entries.items()
        },
    )
    wanted = next(requests)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (wanted["limit"], hard))
    urls = _urls(artifact)
    for name in wanted["download"]:
        # Not artifact.download(), which follows references to anywhere, and whose threads share
        # one target path when they skip the cache.
        entry = artifact.get_entry(name)
        entry._download_url = urls.get(name)
        path = _downloaded(entry, wanted["to"])
        if _digest(path, entry) != entry.digest:
            raise _FailedError("damaged", f"{name} does not match the digest in the artifact")
        reply(file=name)
    reply(done=True)


def _downloaded(entry: Any, directory: str) -> str:
    """The path of a file once it is there; a connection that is lost is tried again."""
    for left in reversed(range(_TRIES)):
        try:
            return str(entry.download(root=directory, skip_cache=True))
        except Exception as error:
            kind = _kind(error)
            if left == 0 or kind != "unreachable":
                kind = "damaged" if kind == "missing" else kind  # the artifact lists it
                raise _FailedError(kind, f"{entry.path}: {error}") from None
    raise AssertionError


def _refuse_short_bodies() -> None:
    """Makes a body that ends early an error; urllib3 1 takes it for the whole one."""
    from urllib3.response import HTTPResponse

    complete = partialmethod(HTTPResponse.__init__, enforce_content_length=True)
    HTTPResponse.__init__ = complete


def _find(wandb: Any, name: str) -> Any:
    try:
        api = wandb.Api(overrides=_entity(name), timeout=SECONDS)
    except wandb.errors.UsageError as error:
        raise _FailedError("credentials", error) from None
    except wandb.errors.AuthenticationError as error:
        # The cause is an answer of the server, or that there was none; else the key has no such
        # form.
        kind = _kind(error) if error.__cause__ else "credentials"
        kind = "credentials" if kind == "forbidden" else kind
        raise _FailedError(kind, error.__cause__ or error) from None
    try:
        artifact = api.artifact(name)
    except wandb.errors.CommError as error:
        inner = getattr(error, "exc", None)
        kind = "missing" if type(inner) is ValueError else _kind(error)
        raise _FailedError(kind, error) from None
    if artifact.state != "COMMITTED":
        raise _FailedError("missing", f"it is {str(artifact.state).lower()}")
    return artifact


def _entity(name: str) -> dict[str, str]:
    """The entity of a name, else the client asks W&B for the user's default."""
    parts = name.partition(":")[0].split("/")
    is_full = len(parts) == 3 and not parts[1].startswith("wandb-registry-")
    return {"entity": parts[0]} if is_full else {}


def _urls(artifact: Any) -> dict[str, str]:
    """Where the files can be downloaded, by name, as ``artifact.download()`` asks for it. The
    client has another, slower way for those of which this is not known."""
    found: dict[str, str] = {}
    cursor, has_more = None, True
    while has_more:
        page = artifact._fetch_file_urls(cursor=cursor, per_page=1000)
        found |= {edge.node.name: edge.node.direct_url for edge in page.edges if edge.node}
        has_more, cursor = page.page_info.has_next_page, page.page_info.end_cursor
    return found


def _kind(error: BaseException) -> str:
    """Which of ``ERRORS`` an exception of the client is, by the HTTP status in it or its causes."""
    if isinstance(error, OSError) and error.errno is not None:
        import errno

        if error.errno == errno.EFBIG:
            return "damaged"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO):
            return "disk"
    status = _status(error)
    if status in (401, 403):
        return "forbidden"
    return "missing" if status in (404, 410) else "unreachable"


def _status(error: BaseException | None) -> int | None:
    for _ in range(5):
        if error is None:
            return None
        response = getattr(error, "response", None)
        for name in ("status_code", "http_status"):
            if isinstance(status := getattr(response, name, None), int) and status:
                return status
        error = getattr(error, "exc", None) or error.__cause__ or error.__context__
    return None


def _digest(path: str, entry: Any) -> str:
    """The digest of a file in the form that W&B's manifest has."""
    if entry.extra.get("alg") == "XXH128":
        from wandb.sdk.lib.hashutil import xxh128_file_b64

        return str(xxh128_file_b64(path))
    digest = hashlib.md5(usedforsecurity=False)
    with Path(path).open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return base64.b64encode(digest.digest()).decode()
