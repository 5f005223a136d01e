"""Reads an artifact of W&B: what it is, its list of files, and the files that are wanted.

The list comes from whoever has made the artifact. Names are used only as those of files in the
directory of the download, no file gets larger than the list says, and references are given back
as texts: nothing is fetched from them here. Every wait is bounded.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.checkpoint.damage import NOT_A_FILE
from train.exits import DataError, RetryError, RunError, UsageError, first_line
from train.files import is_plain_name
from train.json_files import Fields, has_fields, is_count, parse_object, shown

SILENCE = 40.0
"""Seconds after which a server that sends nothing more is given up."""
_START = 120.0
"""Seconds that the client may take to be imported."""
_LISTED: Fields = {"name": str, "type": str, "metadata": (dict, type(None)), "files": dict}
_ENTRY: Fields = {"size": (int, type(None)), "ref": (str, type(None))}
_LINE = 64 << 20  # bytes
_TYPE = "model"
# As in the process that imports it, but not with the working directory first.
_CLIENT = """
import json, os, sys
sys.path[:] = json.loads(os.environ.pop("ISORUN_PATH"))
from train.artifacts.client import main
main()
"""


@dataclass(frozen=True)
class Listing:
    """What W&B says of an artifact."""

    name: str
    """``entity/project/name:version``, so one version for ever."""
    sizes: dict[str, int]
    """The files that W&B has, by name, with their size in bytes."""
    references: dict[str, str]
    """The URLs of what W&B does not have, by name."""
    metadata: dict[str, Any]


Choose = Callable[[Listing], list[str]]
"""Selects the files to download. May raise any RunError."""


def fetch(name: str, directory: Path, where: str, choose: Choose) -> Listing:
    """Downloads the files that ``choose`` selects into the new directory ``files`` in
    ``directory``, which is made.

    ``where`` begins messages: field and value. Raises UsageError without credentials or rights, or
    for an artifact that does not exist or is not a model, DataError for one that is damaged, and
    RetryError where W&B or the disk fails.
    """
    directory.mkdir(mode=0o700)
    files = directory / "files"
    files.mkdir()
    with started_client(directory) as client:
        client.answer(where, seconds=_START)
        client.send(name=name)
        listing = _listing(client.answer(where), where)
        wanted = choose(listing)
        for folder in {(files / each).parent for each in wanted}:
            folder.mkdir(parents=True, exist_ok=True)
        _check_space(files, sum(listing.sizes[each] for each in wanted), where)
        limit = max((listing.sizes[each] for each in wanted), default=0)
        client.send(download=wanted, to=str(files), limit=max(limit, 1 << 20))
        while not client.answer(where, files).get("done"):
            pass
    for each in wanted:
        if (size := (files / each).stat().st_size) != listing.sizes[each]:
            raise DataError(
                f"{where}, which is damaged: W&B sent {size} bytes of {each}, whose size is "
                f"{listing.sizes[each]}; name another version."
            )
    return listing


@contextmanager
def refused_files(where: str) -> Iterator[None]:
    """Turns errors of local files into RunErrors: 65 for what is no regular file, else 75."""
    try:
        yield
    except NOT_A_FILE as error:
        raise DataError(
            f"{where}, but {error.filename} cannot be used ({error.strerror}); name another "
            "version."
        ) from None
    except OSError as error:
        raise RetryError(
            f"{where}, but {error.filename or 'it'} cannot be stored or read "
            f"({error.strerror or first_line(error)}); fix the cause, then rerun."
        ) from error


def _listing(answer: dict[str, Any], where: str) -> Listing:
    if not has_fields(answer, _LISTED):
        raise RetryError(f"{where}, but W&B's answer cannot be read; rerun later.")
    if answer["type"] != _TYPE:
        raise UsageError(
            f"{where}, an artifact of the type {shown(answer['type'])}; name one of the type "
            f"{_TYPE!r}."
        )
    sizes: dict[str, int] = {}
    references: dict[str, str] = {}
    for name, entry in answer["files"].items():
        if not all(map(is_plain_name, name.split("/"))):
            raise DataError(
                f"{where}, which names the file {shown(name)}, outside of its directory; do not "
                "use this artifact."
            )
        if not has_fields(entry, _ENTRY) or not (entry["ref"] or is_count(entry["size"])):
            raise DataError(f"{where}, which does not give the size of {name}; name another.")
        if entry["ref"]:
            references[name] = entry["ref"]
        else:
            sizes[name] = entry["size"]
    return Listing(answer["name"], sizes, references, answer["metadata"] or {})


def _check_space(directory: Path, size: int, where: str) -> None:
    free = shutil.disk_usage(directory).free
    if size > free:
        raise RetryError(
            f"{where}, which has {size:,} bytes, but {directory} has {free:,} bytes free; make "
            "space, then rerun."
        )


class _Client:
    """The process of ``train.artifacts.client``."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        assert process.stdin
        assert process.stdout
        self._input, self._output = process.stdin, process.stdout
        os.set_blocking(self._output.fileno(), False)
        self._rest = b""

    def send(self, **values: Any) -> None:
        with suppress(BrokenPipeError):  # it has ended; the answer says why
            self._input.write(json.dumps(values).encode() + b"\n")
            self._input.flush()

    def answer(
        self, where: str, growing: Path | None = None, *, seconds: float = 0.0
    ) -> dict[str, Any]:
        """The next answer. While ``growing``, a directory, gets more bytes, it is waited for."""
        seconds = seconds or SILENCE
        until, size = time.monotonic() + seconds, 0
        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if selector.select(1.0):
                    if not (data := self._output.read(1 << 20)) or len(self._rest) > _LINE:
                        raise RetryError(f"{where}, but W&B's client has failed; rerun.")
                    self._rest += data
                    until = time.monotonic() + seconds
                elif growing and (now := _bytes_in(growing)) != size:
                    until, size = time.monotonic() + seconds, now
                elif time.monotonic() > until:
                    raise RetryError(
                        f"{where}, but W&B sent nothing for {seconds:.0f} s; rerun when it can be "
                        "reached."
                    )
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            values = parse_object(line)
        except ValueError:
            raise RetryError(f"{where}, but W&B's answer cannot be read; rerun later.") from None
        if "error" in values:
            raise _error(values["error"], str(values.get("text")), where)
        return values


def _bytes_in(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):  # a temporary file of the client
            total += path.lstat().st_size
    return total


def _error(kind: str, text: str, where: str) -> RunError:
    if kind == "credentials":
        return UsageError(
            f"{where}, but W&B has no valid credentials ({text}); set WANDB_API_KEY, or log in "
            "with `wandb login`."
        )
    if kind == "missing":
        return UsageError(f"{where}, which W&B does not have ({text}); correct the name or alias.")
    if kind == "forbidden":
        return UsageError(f"{where}, which W&B refuses ({text}); get access, or name another.")
    if kind == "damaged":
        return DataError(f"{where}, which is damaged ({text}); name another version.")
    if kind == "disk":
        return RetryError(f"{where}, but it cannot be stored ({text}); fix the cause, then rerun.")
    return RetryError(f"{where}, but W&B cannot be reached ({text}); rerun when it can.")


@contextmanager
def started_client(directory: Path) -> Iterator[_Client]:
    """The running client; it ends with the context. Its own files are in ``directory``."""
    cache = str(directory / "wandb")
    environment = {k: v for k, v in os.environ.items() if k not in ("WANDB_MODE", "WANDB_SERVICE")}
    environment |= {
        "ISORUN_PATH": json.dumps(sys.path),
        "WANDB_DIR": cache,
        "WANDB_DATA_DIR": cache,
        "WANDB_CACHE_DIR": cache,
        "WANDB_ARTIFACT_DIR": cache,
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
        # By default a request is repeated for hours.
        "WANDB__GRAPHQL_RETRY_MAX": "2",
        "WANDB__GRAPHQL_RETRY_WAIT_MAX_SECONDS": "2",
        "WANDB_HTTP_TIMEOUT": "10",
    }
    (directory / "wandb").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _CLIENT],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        yield _Client(process)
    finally:
        # With the background service of W&B's client.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout):
            with suppress(OSError):
                stream.close()  # type: ignore[union-attr]
