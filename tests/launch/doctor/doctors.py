"""Starts the doctor as an agent does, with one process per node."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

from tests.support.forked import quick_python
from tests.support.runs import ROOT, TINY, environment, free_port

FIT = ["--", "python", "-m", "train", "fit", *TINY]


@dataclass
class Told:
    """The exit codes, the output and the report of a preflight."""

    codes: list[int]
    output: list[str]
    errors: list[str]
    report: dict | None

    def found(self, check, status=None):
        return [
            f
            for f in self.report["findings"]
            if f["check"] == check and status in (None, f["status"])
        ]

    def only(self, check, status):
        found = self.found(check, status)
        assert len(found) == 1, self.report["findings"]
        return found[0]


def clean():
    """An environment without settings of the person who runs the tests."""
    prefixes = ("WANDB_", "GLOO_", "NCCL_", "ISORUN_", "http", "HTTP", "no_proxy", "NO_PROXY")
    return {k: v for k, v in environment().items() if not k.startswith(prefixes)}


def doctor(tmp_path, *arguments, nodes=1, command=None, env=None, each=None, before=None,
           only=None, expect=0, module=("-m", "launch.doctor"), quick=True):  # fmt: skip
    """``each``: further variables per node; ``before``: words before the command per node;
    ``command``: the training command, or one per node; ``only``: the ranks to start; ``quick``:
    without slow imports."""
    file = tmp_path / "report.json"
    file.unlink(missing_ok=True)
    command = FIT if command is None else command
    if not command or isinstance(command[0], str):
        command = [command] * nodes
    place = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(nodes),
        "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
    } if nodes > 1 else {}  # fmt: skip
    started = []
    # What stands before the command, such as a namespace, would not reach a forked process.
    python, variables = (sys.executable, {}) if before or not quick else quick_python()
    for rank in range(nodes) if only is None else only:
        own = {"RANK": str(rank), "GROUP_RANK": str(rank)} if nodes > 1 else {}
        started.append(
            subprocess.Popen(
                [*(before[rank] if before else ()), python, *module, "--json", str(file),
                 *arguments, *command[rank]],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env={
                    **clean(), **variables, **place, **own, **(env or {}),
                    **(each[rank] if each else {}),
                },
            )
        )  # fmt: skip
    done = [process.communicate(timeout=300) for process in started]
    told = Told(
        [process.returncode for process in started],
        [output for output, _ in done],
        [errors for _, errors in done],
        json.loads(file.read_text()) if file.exists() else None,
    )
    assert told.codes == (expect if isinstance(expect, list) else [expect] * len(started)), told
    assert not any("Traceback" in text for text in told.output + told.errors), told
    return told


def in_mount_namespace(script):
    """Words that start a command in a new mount namespace, which the script prepares."""
    return ["unshare", "--mount", "sh", "-c", f'{script} && exec "$@"', "sh"]


def why_no_mount_namespace():
    try:
        words = in_mount_namespace("mount -t tmpfs tmpfs /mnt")
        done = subprocess.run([*words, "true"], capture_output=True, text=True)
    except FileNotFoundError:
        return "`unshare` is not installed (util-linux)"
    return f"mounts cannot be created ({done.stderr.strip()})" if done.returncode else None


def with_sitecustomize(directory, code):
    """The variable that makes Python run ``code`` at its start."""
    directory.mkdir(exist_ok=True)
    (directory / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")])}
