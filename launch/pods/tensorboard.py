"""TensorBoard for a run on a cluster, in a pod of its own and at a port of this machine."""

from __future__ import annotations

import socket
import subprocess
import time

from launch.contract import LOOPBACK, RetryError, UsageError, log
from launch.pods.find import ClusterRun
from launch.pods.reader import reader
from launch.pods.words import files_command

PORT = 6006
_SECONDS = 120.0
"""How long the pod may take to find the run directory and to start TensorBoard."""
_TRIES = 5
# In the pod: waits until TensorBoard listens.
_LISTENS = f"""
import socket, time
until = time.monotonic() + {_SECONDS / 2}
while True:
    try:
        socket.create_connection(("127.0.0.1", {PORT})).close()
        break
    except OSError:
        if time.monotonic() > until:
            raise SystemExit("TensorBoard does not listen")
        time.sleep(0.2)
"""


def serve(run: ClusterRun, port: int, directory: str | None) -> None:
    """Serves TensorBoard until Ctrl-C; not in a pod of the training, whose memory it would use.
    Raises UsageError or RetryError."""
    _check_free(port)
    with reader(run, own=True) as container:
        place = container.output(files_command(run, ["where"], directory), _SECONDS)
        words = [
            "python", "-m", "tensorboard.main", "--logdir", place.strip(),
            "--host", "127.0.0.1", "--port", str(PORT),
        ]  # fmt: skip
        with subprocess.Popen(
            container.exec_command(words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as serving:
            try:
                container.output(["python", "-c", _LISTENS], _SECONDS)
                log(f"TensorBoard of {run.label}: http://localhost:{port}/ ; Ctrl-C ends it")
                _forward(container.forward_command([f"{port}:{PORT}"]), serving)
            finally:
                serving.terminate()
    raise RetryError(f"TensorBoard of {run.label} has ended, or its pod is gone; start it again.")


def _forward(command: list[str], serving: subprocess.Popen[bytes]) -> None:
    """Forwards until TensorBoard ends: kubectl gives up at the first connection that fails."""
    failures = 0
    while serving.poll() is None and failures < _TRIES:
        started = time.monotonic()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        failures = failures + 1 if time.monotonic() - started < _TRIES else 0
        time.sleep(1)


def _check_free(port: int) -> None:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((LOOPBACK, port))
        except OSError as error:
            raise UsageError(
                f"Port {port} of this machine cannot be used ({error.strerror}); choose another "
                "one with --port."
            ) from None
