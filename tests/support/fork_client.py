"""Asks the fork server (fork_server.py) to run a Python program; imports nothing slow.

As a program it replaces ``python`` (see ``quick_python`` in forked.py). It passes what the server
can run to the server, with this process's arguments, environment, working directory and open files,
and forwards signals and the exit code. Everything else it passes to the real interpreter.
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
    signal.SIGXCPU,
]  # fmt: skip


class Forked:
    """A program in a process that the server has forked."""

    def __init__(self, address, program, files, *, cwd, env, netns=None):
        sys.audit(STARTS)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(address)
        request = json.dumps({"program": program, "cwd": cwd, "env": env, "netns": netns})
        socket.send_fds(self._socket, [request.encode()], files)
        self.pid = int(self._socket.recv(32))
        self._code = None

    def signal(self, number):
        """Sends it a signal; raises ProcessLookupError if it has ended."""
        os.kill(self.pid, number)

    def wait(self, seconds=None):
        """Its exit code, negative for a signal; None if it is still running after ``seconds``."""
        if self._code is None:
            self._socket.settimeout(seconds)
            try:
                self._code = int(self._socket.recv(32))
            except (TimeoutError, BlockingIOError):
                return None
            self._socket.close()
        return self._code


def program_of(words):
    """The request to the server for a command line of Python; None if the server cannot run it."""
    options = list(itertools.takewhile(("-u", "-P").__contains__, words))
    kept = {"unbuffered": "-u" in options, "safe_path": "-P" in options}
    words = words[len(options) :]
    if len(words) >= 2 and words[0] == "-m":
        return {"module": words[1], "words": words[2:], **kept}
    if len(words) >= 2 and words[0] == "-c":
        return {"code": words[1], "words": words[2:], **kept}
    if words and words[0].endswith(".py"):
        return {"file": words[0], "words": words[1:], **kept}
    return None


def _served():
    """Whether the server can run this program: the number of threads, which torch has read, is the
    same, and no sitecustomize of the user applies."""
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    changed = any(os.path.exists(os.path.join(p, "sitecustomize.py")) for p in path if p)
    return os.environ.get("OMP_NUM_THREADS") == "1" and not changed


def main(python, name, entry, words):
    """Replaces ``python``, or the console script ``name`` with that entry point."""
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
    os._exit(code)  # without teardown, during which a signal would change the code
