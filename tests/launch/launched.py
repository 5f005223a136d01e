"""Recorded launches, and the output of ``python -m launch`` for them."""

import json

from launch.cli import main
from launch.history import launch_log
from tests.launch.launching import app
from tests.support.runs import TINY


def submit(job="x1", scheduler="slurm", *words, **changes):
    """Records a launch; returns its handle and its run id."""
    made = app("isorun.fit", "-j", "2x1", *TINY, *words)
    handle = f"{scheduler}://torchx/{job}"
    launch_log.record_start(handle, scheduler, made, "the request")
    for key, value in changes.items():
        lines = [json.loads(line) for line in launch_log.path().open()]
        lines[-1][key] = value
        launch_log.path().write_text("".join(json.dumps(line) + "\n" for line in lines))
    return handle, made.roles[0].env["ISORUN_RUN_ID"]


def said(capsys, *words, expect=0):
    assert main(words) == expect
    out, err = capsys.readouterr()
    return out if expect == 0 else err
