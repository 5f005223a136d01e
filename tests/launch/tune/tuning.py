"""Starts ``isorun tune`` in tests, and reads the studies that it leaves."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from launch.cli import main
from tests.launch.tune import short_fit
from tests.support.forked import quick_python
from tests.support.runs import ROOT, environment

BASE = ["--config", "configs/digits.yaml", "evaluate.every_steps=2", "evaluate.every_epochs=null"]
_PROGRAM = [sys.executable, "-S", short_fit.__file__]
_SHORT = f"""
import sys
import launch.tune.trial
import launch.tune.wandb_sweep
from launch.cli import main
launch.tune.wandb_sweep.HEARTBEAT = 0.2
launch.tune.trial.python_module = lambda name: {_PROGRAM!r}
sys.exit(main(sys.argv[1:]))
"""

_JOBS = """
import sys
from launch.cli import main
sys.executable = {python!r}
sys.exit(main(sys.argv[1:]))
"""
_NODE = """#!{python} -IS
import os, signal, sys
sys.path.insert(0, {folder!r})
import short_fit
signal.signal(signal.SIGTERM, lambda *_: short_fit.stopped.append(1))
sys.exit(short_fit.main(sys.argv[sys.argv.index("fit") + 1 :]))
"""

_REAL = """
import sys
from launch.cli import main
sys.executable = {python!r}
sys.exit(main(sys.argv[1:]))
"""


def words(directory, space, *more, base=BASE):
    """The command line after ``isorun``; ``space`` is the text of the space file."""
    file = Path(directory).with_suffix(".yaml")
    file.write_text(space)
    return ["tune", *base, "--space", str(file), *more, f"run.dir={directory}"]


def start(directory, space, *more, step=0.01):
    """Starts it in the background, with runs that take hundredths of a second."""
    return _start(_SHORT, words(directory, space, *more), SHORT_FIT_STEP=str(step))


def start_jobs(directory, space, *more, step=0.01):
    """The same with each trial as a job of local_cwd; the agent of a job is the run itself."""
    folder = Path(directory).parent / "programs"
    folder.mkdir(exist_ok=True)
    python = folder / "python"
    short = str(Path(short_fit.__file__).parent)
    python.write_text(_NODE.format(python=sys.executable, folder=short))
    python.chmod(0o755)
    arguments = words(directory, space, "-s", "local_cwd", *more)
    return _start(_JOBS.format(python=str(python)), arguments, SHORT_FIT_STEP=str(step))


def run_jobs(directory, space, *more, step=0.01, expect=0):
    """The same to its end; returns its output."""
    return _output(start_jobs(directory, space, *more, step=step), expect)


def start_real(directory, space, *more):
    """Starts it in the background, with real runs that start without the slow imports."""
    python, variables = quick_python()
    program = _REAL.format(python=python)
    if "WANDB_BASE_URL" not in os.environ:
        variables["WANDB_MODE"] = "disabled"
    return _start(program, words(directory, space, *more), **variables)


def run(directory, space, *more, step=0.01, expect=0):
    """The same to its end; returns its output."""
    return _output(start(directory, space, *more, step=step), expect)


def _start(program, arguments, **variables):
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, env={**environment(), **variables},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def _output(process, expect):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == expect, f"exit {process.returncode}\n{out}"
    return out


def refused(capsys, *arguments):
    """The sentence and the exit code of a command that starts nothing."""
    code = main(["tune", *arguments])
    return code, capsys.readouterr().err.strip()


def shown(directory):
    """What ``--show --json`` prints of a study."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["tune", "--show", str(directory), "--json"]) == 0
    return json.loads(out.getvalue())


def facts(directory):
    """Each trial's facts that do not depend on the time."""
    return [
        (t["number"], t["state"], t["values"], t["step"], t["params"])
        for t in shown(directory)["trials"]
    ]


def starts(directory, number):
    """How often the run of a trial was started."""
    return len(Path(directory, "trials", f"{number:04}", "starts").read_text().split())


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
