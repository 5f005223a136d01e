"""Asks the fork server (fork_server.py) to run a Python program; imports nothing that is slow.

As a program it stands in for ``python`` (see ``quick_python`` in forked.py): what the server can run
is run there, with this process's arguments, environment, working directory and open files; signals
and the exit code are passed on. Everything else is handed to the real interpreter.
"""

import itertools
import json
import os
import signal
import socket
import sys
from contextlib import suppress

SERVER = "FORK_SERVER_OF_TESTS"
"""The environment variable with the server's socket."""
STARTS = "tests.fork"
"""The audit event of each start."""
PASSED_ON = [
    signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT,
]  # fmt: skip


class Forked:
    """A program that runs in a process which the server has forked."""

    def __init__(self, address, program, files, *, cwd, env, netns=None):
        sys.audit(STARTS)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(address)
        request = json.dumps({"program": program, "cwd": cwd, "env": env, "netns": netns})
        socket.send_fds(self._socket, [request.encode()], files)
        self.pid = int(self._socket.recv(32))
        self._code = None

    def signal(self, number):
        """Sends it a signal; ProcessLookupError where it has ended."""
        os.kill(self.pid, number)

    def wait(self, seconds=None):
        """Its exit code, negative for a signal; None where it still runs after so long."""
        if self._code is None:
            self._socket.settimeout(seconds)
            try:
                self._code = int(self._socket.recv(32))
            except (TimeoutError, BlockingIOError):
                return None
            self._socket.close()
        return self._code


def program_of(words):
    """What the server is asked to run for a command line of Python; None where it cannot."""
    options = list(itertools.takewhile(("-u", "-P").__contains__, words))
    kept = {"unbuffered": "-u" in options, "safe_path": "-P" in options}
    words = words[len(options) :]
    if len(words) >= 2 and words[0] == "-m":
        return {"module": words[1], "words": words[2:], **kept}
    if words and words[0].endswith(".py"):
        return {"file": words[0], "words": words[1:], **kept}
    return None


def _served():
    """Whether the server's interpreter is as this program's would be: torch has read the number of
    threads, and no file of the user's has run at its start."""
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    changed = any(os.path.exists(os.path.join(p, "sitecustomize.py")) for p in path if p)
    return os.environ.get("OMP_NUM_THREADS") == "1" and not changed


def main(python, name, entry, words):
    """Stands in for ``python``, or for the console script ``name`` with that entry point."""
    program = {"entry": entry, "name": name, "words": words} if entry else program_of(words)
    address = os.environ.get(SERVER)
    if program is None or address is None or not _served():
        real = os.path.join(os.path.dirname(python), name) if entry else python
        os.execv(real, [real, *words])
    program["executable"] = os.environ.get("PYTHON_OF_TESTS", python)
    forked = Forked(address, program, [0, 1, 2], cwd=os.getcwd(), env=dict(os.environ))

    def pass_on(number, _frame):
        with suppress(ProcessLookupError):
            forked.signal(number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    code = forked.wait()
    if code < 0:
        if -code in PASSED_ON:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
