"""Runs commands like ``python -m train``, in processes forked after the slow imports.

Each command has its own process, signals, exit code and output. The imports of torch, Accelerate
and DeepSpeed, up to ten seconds, happen once, in a server (fork_server.py) that ends with this
process.
"""

import atexit
import functools
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from tests.support import fork_client, fork_server
from tests.support.runs import ROOT, TINY, environment, free_port
from tests.support.runs import command as command_line

_starting, _making = threading.Lock(), threading.Lock()


@functools.cache
def _started():
    folder = tempfile.TemporaryDirectory(prefix="isorun-fork-server-")
    address = os.path.join(folder.name, "socket")
    hidden = ("PYTHONPATH", "COVERAGE_PROCESS_START")
    env = {k: v for k, v in environment().items() if k not in hidden}
    server = subprocess.Popen(
        [sys.executable, fork_server.__file__, address],
        cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert "ready" in server.stdout.readline(), "the fork server has not started"

    def stop():
        server.stdin.close()
        server.wait()
        folder.cleanup()

    atexit.register(stop)
    return address


def server():
    """The address of this process's server; the first call starts it."""
    with _starting:
        return _started()


@dataclass
class Done:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str


class Command:
    """A running command; ``arguments`` are those after ``python -m train``."""

    def __init__(self, *arguments, cwd=ROOT, env=None, netns=None, module="train"):
        self._output = tempfile.TemporaryDirectory()
        self._files = [Path(self._output.name) / name for name in ("out", "err")]
        program = {"module": module, "words": [str(argument) for argument in arguments]}
        files = [os.open(os.devnull, os.O_RDONLY)]
        files += [os.open(f, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) for f in self._files]
        try:
            self._forked = fork_client.Forked(
                server(), program, files,
                cwd=str(cwd), env={**environment(), **(env or {})}, netns=netns,
            )  # fmt: skip
        finally:
            for file in files:
                os.close(file)

    @property
    def pid(self):
        return self._forked.pid

    def signal(self, number):
        self._forked.signal(number)

    def poll(self):
        return self._forked.wait(0)

    def stderr(self):
        """Its standard error so far."""
        return self._files[1].read_text()

    def wait(self, seconds=120):
        late = self._forked.wait(seconds) is None
        if late:
            self.signal(signal.SIGKILL)
        done = Done(self._forked.wait(), *(file.read_text() for file in self._files))
        assert not late, f"not done after {seconds} s\n{done.stdout}\n{done.stderr}"
        self._output.cleanup()
        return done


@functools.cache
def _programs():
    folder = tempfile.mkdtemp(prefix="isorun-programs-")
    atexit.register(shutil.rmtree, folder)
    scripts = {"python": None, "torchrun": "torch.distributed.run:main"}
    for script in entry_points(group="console_scripts"):
        if script.name in ("torchx", "accelerate") or script.dist.name == "isorun":
            scripts[script.name] = script.value
    client = Path(fork_client.__file__)
    for name, entry in scripts.items():
        file = Path(folder) / name
        file.write_text(
            f"#!{sys.executable} -IS\n"
            f"import sys\nsys.path.insert(0, {str(client.parent)!r})\nimport {client.stem}\n"
            f"{client.stem}.main({sys.executable!r}, {name!r}, {entry!r}, sys.argv[1:])\n"
        )
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    python = f"{folder}/python"
    return python, {fork_client.SERVER: server(), "PYTHON_OF_TESTS": python}


def quick_python():
    """A program that replaces ``sys.executable`` and starts without the slow imports, and the
    environment variables that it needs. Processes that it starts with ``sys.executable`` (as
    torchrun does) also start without them. Its directory has programs for torchrun, torchx,
    accelerate and our console scripts as well."""
    with _making:
        python, variables = _programs()
    return python, dict(variables)


def quick(words):
    """Popen's arguments for a command line of Python that starts without the slow imports."""
    assert words[0] == sys.executable, words
    python, variables = quick_python()
    return {"args": [python, *words[1:]], "env": {**environment(), **variables}}


def quick_start(*args, **kwargs):
    """Starts a run in the background, from a shell's point of view (see
    tests.support.runs.start)."""
    return subprocess.Popen(
        **quick(command_line(*args, **kwargs)), cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def quick_run(*args, expect=0, **kwargs):
    """Runs such a run to its end, with ``processes`` through torchrun. Checks its exit code."""
    done = subprocess.run(
        **quick(command_line(*args, **kwargs)), cwd=ROOT,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def command(*arguments, expect=0, cwd=ROOT):
    """Runs any command to its end; checks its exit code."""
    done = Command(*arguments, cwd=cwd).wait()
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def start(name, directory, *overrides, base=TINY, cwd=ROOT):
    """Starts a command on a run directory in the background."""
    return Command(name, *base, f"run.dir={directory}", *overrides, cwd=cwd)


def run(name, directory, *overrides, expect=0, base=TINY, cwd=ROOT):
    """Runs a command on a run directory to its end; checks its exit code."""
    return command(name, *base, f"run.dir={directory}", *overrides, expect=expect, cwd=cwd)


def start_ranks(count, name, directory, *overrides, base=TINY, own={}, cwds=None, hosts=None):  # noqa: B006
    """Starts several ranks with the environment that torchrun sets. ``own``: extra overrides per
    rank; ``cwds``: working directories; ``hosts``: one rank on each host."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    shared["LOCAL_WORLD_SIZE"] = str(count)
    each = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    if hosts:
        shared |= {"MASTER_ADDR": f"{hosts.subnet}.1", "LOCAL_WORLD_SIZE": "1"}
        for rank, own_variables in enumerate(each):
            own_variables |= {"LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": hosts.cables[rank]}
    return [
        Command(
            name, *base, f"run.dir={directory}", *overrides, *own.get(rank, []),
            cwd=cwds[rank] if cwds else ROOT, env={**shared, **each[rank]},
            netns=hosts.names[rank] if hosts else None,
        )
        for rank in range(count)
    ]  # fmt: skip


def run_ranks(count, name, directory, *overrides, expect=0, base=TINY):
    """Runs several ranks to their end; unlike torchrun, returns each rank's own exit code."""
    done = [rank.wait() for rank in start_ranks(count, name, directory, *overrides, base=base)]
    for rank, result in enumerate(done):
        if expect is not None:
            assert result.returncode == expect, f"rank {rank}: exit {result.returncode}\n{done}"
    return done


def wait_for(process, condition, seconds=60):
    """Returns when the condition holds. Fails if the process ends before, or after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.wait()
        assert time.monotonic() < deadline, f"timed out\n{process.stderr()}"
        time.sleep(0.005)
