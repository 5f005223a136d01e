"""How a process ends."""

import os
import subprocess
import sys

import pytest

from tests.support.runs import ROOT

LINGERING = """
import atexit, os, sys, threading, time
import train.cli

class Lingers:
    def __del__(self, write=os.write):
        write(1, b"interpreter torn down\\n")

def main(*_):
    sys.lingers = Lingers()
    atexit.register(print, "exit hooks ran", flush=True)
    threading.Thread(target=lambda: (time.sleep(0.5), print("thread ended"))).start()
    return 75

train.cli.main = main
"""
PYTHON_M_TRAIN = "import runpy; runpy.run_module('train', run_name='__main__', alter_sys=True)"
ISORUN = "import launch.cli; sys.argv = ['isorun', 'fit']; sys.exit(launch.cli.main())"


@pytest.mark.parametrize(
    ("start", "world_size"),
    [(PYTHON_M_TRAIN, None), (PYTHON_M_TRAIN, "1"), (PYTHON_M_TRAIN, "2"), (ISORUN, "2")],
)
def test_one_of_several_processes_ends_without_interpreter_teardown(start, world_size):
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    if world_size:
        environment["WORLD_SIZE"] = world_size
    done = subprocess.run(
        [sys.executable, "-c", LINGERING + start],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 75, done.stderr
    said = done.stdout.splitlines()
    assert said[:2] == ["thread ended", "exit hooks ran"]
    assert (len(said) == 2) == (world_size == "2"), said
