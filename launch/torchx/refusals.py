"""Turns what a backend refuses, such as Slurm, Docker or a cluster, into an error of one sentence.

The exceptions of their libraries are recognised by name: the libraries are optional, and slow to
import.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.contract import RetryError, RunError, UsageError, first_line

# Text of Slurm's commands for what may work later.
_BUSY = re.compile(
    r"unable to contact|timed out|temporarily|connection refused|try again|not responding"
    r"|communication|no route|congest",
    re.IGNORECASE,
)
_LATER = "retry later"


@dataclass(frozen=True)
class Refusal:
    """What a backend has refused."""

    reason: str
    """The backend's own, without a final full stop."""
    advice: str
    later: bool = False
    """Whether the same command may succeed later."""

    def error(self, doing: str) -> RunError:
        """The error for the user."""
        text = f"Cannot {doing}: {self.reason}; {self.advice}."
        return RetryError(text) if self.later else UsageError(text)


@contextmanager
def refusals(doing: str) -> Iterator[None]:
    """Raises UsageError or RetryError for what a backend refuses; ``doing`` is what is being done,
    such as ``submit the job to slurm``. Other errors pass."""
    try:
        yield
    except Exception as error:
        if (found := refusal_of(error, doing)) is None or found is error:
            raise
        raise found from error


def refusal_of(error: Exception, doing: str) -> RunError | None:
    """The error for the user; None for an error that is a bug."""
    if isinstance(error, RunError):
        return error
    found = next(filter(None, (rule(error) for rule in _RULES)), None)
    return found.error(doing) if found else None


def cluster_refusal(error: Exception) -> Refusal | None:
    """For an error of the Kubernetes client."""
    if _is(error, "kubernetes.ConfigException", "urllib3.LocationValueError"):
        return Refusal(
            f"no cluster is configured ({_line(error)})", "set KUBECONFIG to a kubeconfig"
        )
    if not _is(error, "kubernetes.ApiException"):
        return None
    status, body = getattr(error, "status", None), getattr(error, "body", None)
    try:
        reason = _line(json.loads(body or "")["message"])
    except (TypeError, ValueError, KeyError):
        reason = _line(getattr(error, "reason", None) or error)
    advice = {
        401: "log in to the cluster again",
        403: "ask for this permission, or change what the cluster's policy rejects",
        404: "check that the namespace exists and that the controller for this kind is installed",
        409: "delete the existing object, or choose another name",
    }
    return _by_status(status, reason, advice.get(status or 0, "correct the object"))


def command_refusal(command: str, stderr: str, advice: str) -> Refusal:
    """For a command that has failed with this standard error."""
    prefix = re.compile(rf"{re.escape(command)}: ((error|fatal): )?")
    lines = [prefix.sub("", line, count=1).strip().rstrip(".") for line in stderr.splitlines()]
    reason = ", ".join([line for line in lines if line][-3:])
    if not reason:
        return Refusal(f"{command} failed without a message", _LATER, later=True)
    later = _BUSY.search(reason) is not None
    return Refusal(f"{command} says: {reason}", _LATER if later else advice, later)


def program_refusal(error: OSError, program: str) -> Refusal:
    """For a program that cannot be started."""
    if isinstance(error, FileNotFoundError):
        return Refusal(
            f"{program} is not installed on this machine, or not in PATH",
            "use a machine that has it, such as a login node, or another scheduler",
        )
    return Refusal(f"{program} cannot be started ({error.strerror})", "correct PATH")


def _package(error: Exception) -> Refusal | None:
    if not isinstance(error, ModuleNotFoundError):
        return None
    return Refusal(
        f"the package {error.name!r} is not installed",
        "install it with pip, or choose another scheduler with -s",
    )


def _program(error: Exception) -> Refusal | None:
    if isinstance(error, subprocess.CalledProcessError):
        words = [error.cmd] if isinstance(error.cmd, str) else list(error.cmd)
        text = error.stderr or ""
        text = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
        name = Path(str(words[0]).split()[0]).name
        if not text.strip():  # not captured, so it is on the terminal
            return Refusal(
                f"{name} ended with exit code {error.returncode}", "see its message above"
            )
        return command_refusal(name, text, "correct what it names")
    # Of a program that cannot be started, subprocess gives the name without a directory.
    if isinstance(error, FileNotFoundError) and re.fullmatch(r"[\w-]+", str(error.filename)):
        return program_refusal(error, str(error.filename))
    return None


def _docker(error: Exception) -> Refusal | None:
    if _is(error, "docker.BuildError"):
        return Refusal(f"the image cannot be built: {_line(error)}", "correct the workspace")
    if not _is(error, "docker.DockerException"):
        return None
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None:
        return _docker_connection(error)
    reason = _line(getattr(error, "explanation", None) or error)
    advice = "build the image (docs/docker.md), or name another with --image"
    if not _is(error, "docker.ImageNotFound"):
        advice = next((_DOCKER[text] for text in _DOCKER if text in reason), "")
    if advice:  # also with the status of an error of the server
        return Refusal(reason, advice)
    return _by_status(status, reason, "correct what it names")


_DOCKER = {
    "could not select device driver": "install the NVIDIA Container Toolkit, or request no GPUs",
    "bind source path": "create the directory, or correct --mounts",
    "invalid mount": "correct --mounts",
    "executable file not found": "use an image with isorun (docs/docker.md)",
}
"""Text of the engine's errors, and what to do."""


def _docker_connection(error: Exception) -> Refusal:
    system = next((c for c in _causes(error) if isinstance(c, OSError) and c.strerror), None)
    if isinstance(system, PermissionError):
        return Refusal(
            "this user may not use the Docker engine", "add the user to the group docker"
        )
    if system is not None or any(_connection(c) for c in _causes(error)):
        return Refusal(
            f"the Docker engine does not answer ({system.strerror if system else _line(error)})",
            "start it, or set DOCKER_HOST to its address",
            later=True,
        )
    return Refusal(_line(error), "correct DOCKER_HOST and the other settings of Docker")


def _cloud(error: Exception) -> Refusal | None:
    if _is(error, "botocore.ClientError"):
        found: dict[str, Any] = getattr(error, "response", {})
        inner, about = found.get("Error", {}), found.get("ResponseMetadata", {})
        code = str(inner.get("Code", ""))
        reason = f"{_line(inner.get('Message') or error)} ({code})"
        status = 429 if "Throttl" in code or "TooMany" in code else about.get("HTTPStatusCode")
        return _by_status(status, reason, "correct what it names")
    if _is(error, "botocore.HTTPClientError", "botocore.ConnectionError"):
        return Refusal(_line(error), "check the network, then retry", later=True)
    if _is(error, "botocore.BotoCoreError", "google.GoogleAuthError"):
        return Refusal(_line(error), "correct the settings and credentials of the cloud's client")
    if _is(error, "google.GoogleAPICallError"):
        return _by_status(getattr(error, "code", None), _line(error), "correct what it names")
    return None


def _connection(error: BaseException) -> Refusal | None:
    if isinstance(error, BrokenPipeError):  # the reader of our output, not a backend
        return None
    ours = isinstance(error, ConnectionError | TimeoutError)
    if ours or _is(error, "requests.RequestException", "urllib3.HTTPError"):
        reason = _line(getattr(error, "reason", None) or error)
        return Refusal(reason, "check the network and the address, then retry", later=True)
    return None


def _system(error: Exception) -> Refusal | None:
    if not isinstance(error, OSError) or isinstance(error, BrokenPipeError) or not error.strerror:
        return None
    about = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    mistakes = (
        FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError,
    )  # fmt: skip
    if isinstance(error, mistakes):
        return Refusal(about, "correct the path or its permissions")
    return Refusal(about, "fix the cause, then retry", later=True)


def _torchx(error: Exception) -> Refusal | None:
    """TorchX refuses with exceptions of its own, and with built-in ones that have a sentence."""
    of_torchx = _is(error, "torchx.") or (
        isinstance(error, ValueError | LookupError | RuntimeError | AssertionError)
        and _raised_in(error).startswith("torchx.")
        and " " in _line(error)
    )
    if not of_torchx:
        return None
    return Refusal(_line(error), "correct the command, -cfg or .torchxconfig")


_RULES: tuple[Callable[[Exception], Refusal | None], ...] = (
    _package, _program, _docker, cluster_refusal, _cloud, _connection, _system, _torchx,
)  # fmt: skip


def _by_status(status: Any, reason: str, advice: str) -> Refusal:
    """By the status of an HTTP response."""
    later = isinstance(status, int) and (status in (408, 429) or status >= 500)
    return Refusal(reason, _LATER if later else advice, later)


def _is(error: BaseException, *names: str) -> bool:
    """Whether an exception is of one of these classes, ``package.Class``, or of any class of
    ``package.``."""
    for kind in type(error).__mro__:
        package = kind.__module__.partition(".")[0]
        if f"{package}.{kind.__name__}" in names or f"{package}." in names:
            return True
    return False


def _raised_in(error: BaseException) -> str:
    """The module that raised an exception."""
    trace, module = error.__traceback__, ""
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    return module


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that it was made from."""
    seen: set[int] = set()
    rest: list[Any] = [error]
    while rest:
        found = rest.pop(0)
        if not isinstance(found, BaseException) or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        rest += [found.__cause__, found.__context__, getattr(found, "reason", None), *found.args]


def _line(error: object) -> str:
    """The first line of a message. A KeyError's own text has quotation marks."""
    if isinstance(error, KeyError) and error.args:
        error = error.args[0]
    if isinstance(error, BaseException):
        return first_line(error)
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else "no reason given"
