"""Runs commands as ``python -m train`` would, in processes forked after the slow imports.

Each command has a process of its own, with its own signals, exit code and output; only the two
or three seconds that torch and Accelerate take to import are spent once for all of them.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.support.runs import ROOT, TINY, environment, free_port

_starting = threading.Lock()  # this process's environment is changed meanwhile
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        "torch._dynamo",
        "accelerate",
        "torch.distributed.checkpoint",
        "train.loop.fit",
        "train.export.module",
    ]
)


@dataclass
class Done:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str


class Command:
    """A command that is running; ``arguments`` are those after ``python -m train``."""

    def __init__(self, *arguments, cwd=ROOT, env=None, netns=None):
        self._output = tempfile.TemporaryDirectory()
        self._files = [Path(self._output.name) / name for name in ("out", "err")]
        words = [str(argument) for argument in arguments]
        paths = [str(path) for path in self._files]
        with _starting:
            kept = dict(os.environ)
            os.environ.update(environment())  # the server keeps the environment it is started in
            try:
                self._process = _server.Process(
                    target=_main, args=(words, str(cwd), env or {}, netns, *paths)
                )
                self._process.start()
            finally:
                os.environ.clear()
                os.environ.update(kept)

    @property
    def pid(self):
        return self._process.pid

    def signal(self, number):
        os.kill(self.pid, number)

    def poll(self):
        return self._process.exitcode

    def stderr(self):
        """What it has said so far."""
        return self._files[1].read_text() if self._files[1].exists() else ""

    def wait(self, seconds=120):
        self._process.join(seconds)
        late = self._process.exitcode is None
        if late:
            self.signal(signal.SIGKILL)
            self._process.join()
        # One that is killed as soon as it is born has no files.
        said = (f.read_text() if f.exists() else "" for f in self._files)
        done = Done(self._process.exitcode, *said)
        assert not late, f"not done after {seconds} s\n{done.stdout}\n{done.stderr}"
        self._output.cleanup()
        return done


def _main(words, cwd, env, netns, out, err):
    if netns:
        _enter(netns)
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    # As a new interpreter would have them: line by line, and the working directory first.
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    multiprocessing.set_start_method("fork", force=True)  # the default here, for data workers
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:] = [cwd, *(p for p in sys.path if p not in ("", str(ROOT)))]
    sys.argv = ["train", *words]
    from train.cli import main

    sys.exit(main(words))


def _enter(netns):
    """Moves this process into a network namespace (os.setns comes with Python 3.12)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{netns}") as file:
        if libc.setns(file.fileno(), 0x40000000):
            raise OSError(ctypes.get_errno(), f"setns to {netns} failed")


def command(*arguments, expect=0, cwd=ROOT):
    """Any command to its end; checks its exit code."""
    done = Command(*arguments, cwd=cwd).wait()
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def start(name, directory, *overrides, base=TINY, cwd=ROOT):
    """A command on a run directory, in the background."""
    return Command(name, *base, f"run.dir={directory}", *overrides, cwd=cwd)


def run(name, directory, *overrides, expect=0, base=TINY, cwd=ROOT):
    """A command on a run directory to its end; checks its exit code."""
    return command(name, *base, f"run.dir={directory}", *overrides, expect=expect, cwd=cwd)


def start_ranks(count, name, directory, *overrides, base=TINY, own={}, cwds=None, hosts=None):  # noqa: B006
    """Several ranks, with the environment that torchrun gives them. ``own``: further overrides
    of single ranks; ``cwds``: their working directories; ``hosts``: one rank on each."""
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
    """The same to their end; unlike torchrun it shows each rank's own exit code."""
    done = [rank.wait() for rank in start_ranks(count, name, directory, *overrides, base=base)]
    for rank, result in enumerate(done):
        if expect is not None:
            assert result.returncode == expect, f"rank {rank}: exit {result.returncode}\n{done}"
    return done


def wait_for(process, condition, seconds=60):
    """Returns once the condition holds; the process must not end before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.wait()
        assert time.monotonic() < deadline, f"it took too long\n{process.stderr()}"
        time.sleep(0.005)
