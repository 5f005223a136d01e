"""Runs programs in pods by ``kubectl exec``, and forwards ports."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from launch.contract import RetryError, RunError, UsageError, error_of_code
from launch.kubernetes import kustomize


@dataclass(frozen=True)
class Container:
    """A container of a pod."""

    namespace: str
    pod: str
    name: str

    def exec_command(self, words: Sequence[str], *options: str) -> list[str]:
        """The command that runs ``words`` in it."""
        where = ["exec", *options, self.pod, "--container", self.name]
        return [*kubectl(self.namespace), *where, "--", *words]

    def forward_command(self, ports: Sequence[str]) -> list[str]:
        """The command that forwards local ports to it, each ``LOCAL:REMOTE`` or ``PORT``."""
        return [*kubectl(self.namespace), "port-forward", f"pod/{self.pod}", *ports]

    def output(self, words: Sequence[str], seconds: float, given: bytes | None = None) -> str:
        """What a program prints; ``given``: its standard input. Raises UsageError or RetryError,
        also after ``seconds``."""
        try:
            done = subprocess.run(
                self.exec_command(words, *(["-i"] if given is not None else [])), input=given,
                capture_output=True, timeout=seconds, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise RetryError(
                f"The pod {self.pod} did not answer within {seconds:.0f} s; its node may be busy "
                "or lost."
            ) from None
        if done.returncode:
            raise _failed(self.pod, done.returncode, done.stderr.decode(errors="replace"))
        return done.stdout.decode(errors="replace")

    @contextmanager
    def stream(self, words: Sequence[str]) -> Iterator[IO[bytes]]:
        """What a program writes to standard output, while it runs. Raises UsageError or
        RetryError if it fails, in the place of an error of the reader."""
        with subprocess.Popen(
            self.exec_command(words), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            try:
                yield process.stdout
                process.stdout.read()  # what follows the end of an archive
            except Exception:
                process.terminate()
                said = process.stderr.read().decode(errors="replace")
                if (code := process.wait()) > 0 and said.strip():
                    raise _failed(self.pod, code, said) from None
                raise
            except BaseException:
                process.terminate()
                raise
            said = process.stderr.read().decode(errors="replace")
            if code := process.wait():
                raise _failed(self.pod, code, said)


def kubectl(namespace: str) -> list[str]:
    """The start of a kubectl command. Raises UsageError."""
    return [*kustomize.kubectl(), "--namespace", namespace]


def _failed(pod: str, code: int, stderr: str) -> RunError:
    """The error of a failed ``kubectl exec``: that of the program, if it was started."""
    lines = [line for line in stderr.strip().splitlines() if line.strip()]
    if "No module named" in stderr and "launch" in stderr:
        return UsageError(
            f"The image of the pod {pod} has an older isorun, which cannot show its files; build "
            "the image anew, or read them with kubectl."
        )
    own = [line for line in lines if not line.startswith("command terminated with exit code")]
    text = (own or lines or ["kubectl failed without a message"])[-1]
    text = text.removeprefix("isorun: ").removeprefix("error: ").rstrip(".")
    if "(Forbidden)" in text:
        return UsageError(
            f"The cluster refused access to the pod {pod}: {text}; ask for the right to create "
            "pods/exec and pods/portforward."
        )
    if len(own) < len(lines):  # the program itself failed
        return error_of_code(code, f"{text}.")
    return RetryError(f"The pod {pod} could not be reached: {text}; try again.")
