"""Runs Python programs in processes forked after the slow imports.

torch, Accelerate and DeepSpeed take up to ten seconds to import. This server imports them once; each
program that a client (fork_client.py) asks for gets a process of its own, forked from here, with its
own arguments, environment, working directory, files, signals and exit code. A client that goes away,
as when it is killed, takes its program with it.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import threading
import traceback
import types
from contextlib import suppress

PRELOADED = [
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "accelerate",
    "torch.distributed.checkpoint",
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "sklearn.datasets",
    "sympy.combinatorics",
    "sympy.tensor.tensor",
    "tokenizers",
    "torch.export._trace",
    "train.loop.fit",
    "train.export.module",
    "train.loop.open_run",
    "train.loop.open_tracker",
    "train.tasks.digits.task",
    "train.tasks.text.task",
]
# Of extras, and of parts of W&B that it imports with each run.
OPTIONAL = ["matplotlib.pyplot", "s3fs", "sqlalchemy.orm", "wandb.sdk.launch.inputs.internal"]
# Modules that DeepSpeed imports only when it sets up ZeRO.
DEEPSPEED = [
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "train.strategies.zero_stages",
]

temporary = []
"""The temporary directories that modules have made; each forked process makes them anew."""


def preload():
    """Imports the slow modules. It must start no thread, because threads are lost in a fork."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # prevents a pool of processes and its thread
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # checks CUDA without initialising it
    for name in PRELOADED:
        importlib.import_module(name)
    for name in OPTIONAL:
        with suppress(ImportError):
            importlib.import_module(name)
    import torch

    if not torch.cuda.is_available():
        from train.strategies.deepspeed_import import import_deepspeed

        import_deepspeed(torch.device("cpu"))
        for name in DEEPSPEED:
            importlib.import_module(name)
    assert threading.active_count() == 1, threading.enumerate()
    # W&B makes some when it is imported. The first forked process would remove them at its end.
    found = [made for made in gc.get_objects() if isinstance(made, tempfile.TemporaryDirectory)]
    for directory in found:
        directory.cleanup()
    temporary.extend(found)
    # Else each collection in a forked process walks over all of these modules, and so copies them.
    gc.collect()
    gc.freeze()


class Server:
    """Forks a process for each connection and reports its end."""

    def __init__(self, path):
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        self._listener.listen(64)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        # Standard input ends when the process that started the server ends.
        self._selector.register(0, selectors.EVENT_READ, self._close)
        self._clients = {}

    def serve(self):
        """Accepts connections; returns the request in each forked process."""
        while True:
            for key, _ in self._selector.select():
                request = key.data(key.fileobj)
                if request:
                    return request

    def _close(self, _):
        os._exit(0)

    def _accept(self, listener):
        client, _ = listener.accept()
        message, files, _, _ = socket.recv_fds(client, 1 << 20, 3)
        if not message:
            client.close()
            return None
        pid = os.fork()
        if pid == 0:
            self._leave()
            client.close()
            return json.loads(message) | {"files": files}
        for file in files:
            os.close(file)
        process = os.pidfd_open(pid)
        self._clients[client], self._clients[process] = (pid, process), (pid, client)
        self._selector.register(client, selectors.EVENT_READ, self._gone)
        self._selector.register(process, selectors.EVENT_READ, self._ended)
        client.send(str(pid).encode())
        return None

    def _gone(self, client):
        if client not in self._clients:  # the program has just ended as well
            return
        self._selector.unregister(client)
        os.kill(self._clients[client][0], signal.SIGKILL)  # not reaped: the id is still valid

    def _ended(self, process):
        pid, client = self._clients.pop(process)
        del self._clients[client]
        self._selector.unregister(process)
        os.close(process)
        _, status = os.waitpid(pid, 0)
        if client in self._selector.get_map():
            self._selector.unregister(client)
        with suppress(OSError):  # the client may be gone
            client.send(str(os.waitstatus_to_exitcode(status)).encode())
        client.close()

    def _leave(self):
        """In a forked process: closes the server's files."""
        self._selector.close()
        self._listener.close()
        for item in self._clients:
            item.close() if isinstance(item, socket.socket) else os.close(item)


def become(request, path):
    """Gives this process the state of a new interpreter."""
    for descriptor, file in enumerate(request["files"]):
        os.dup2(file, descriptor)
        os.close(file)
    if request["netns"]:
        _enter(request["netns"])
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    program = request["program"]
    first = os.path.dirname(os.path.abspath(program["file"])) if "file" in program else os.getcwd()
    own = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    safe = program.get("safe_path") or os.environ.get("PYTHONSAFEPATH")
    sys.path[:] = [*([] if "entry" in program or safe else [first]), *own, *path]
    importlib.invalidate_caches()
    sys.executable = program.get("executable", sys.executable)
    write_through = bool(program.get("unbuffered") or os.environ.get("PYTHONUNBUFFERED"))
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = open(  # noqa: SIM115
            number, "w" if number else "r", 1 if number == 2 or os.isatty(number) else -1,
            encoding="utf-8", errors="backslashreplace" if number == 2 else "strict", closefd=False,
        )  # fmt: skip
        if number and write_through:
            stream.reconfigure(write_through=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    for directory in temporary:
        directory.__init__()
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def _enter(netns):
    """Moves this process into a network namespace (os.setns needs Python 3.12)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{netns}") as file:
        if libc.setns(file.fileno(), 0x40000000):
            raise OSError(ctypes.get_errno(), f"setns to {netns} failed")


def execute(program):
    """Runs the program as the interpreter would; returns its exit code."""
    sys.argv[1:] = program["words"]
    try:
        if "module" in program:
            runpy.run_module(program["module"], run_name="__main__", alter_sys=True)
        elif "code" in program:
            sys.argv[0] = "-c"
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(program["code"], "<string>", "exec"), vars(sys.modules["__main__"]))
        elif "file" in program:
            sys.argv[0] = program["file"]
            runpy.run_path(program["file"], run_name="__main__")
        else:
            sys.argv[0] = program["name"]
            module, _, function = program["entry"].partition(":")
            sys.exit(getattr(importlib.import_module(module), function)())
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def end(code):
    """Waits for threads and runs exit hooks, but skips the slow teardown of the interpreter."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if not stream.closed:  # json.tool closes them
                stream.flush()
        except OSError:
            code = code or 120  # the interpreter's own code for this
    os._exit(code & 0xFF)


def main():
    """Imports, prints "ready" and serves. Each forked process returns from serve() and runs its
    program."""
    path = [entry for entry in sys.path if entry != os.path.dirname(os.path.abspath(__file__))]
    preload()
    server = Server(sys.argv[1])
    print("ready", flush=True)
    request = server.serve()
    del server
    become(request, path)
    end(execute(request["program"]))


if __name__ == "__main__":
    main()
