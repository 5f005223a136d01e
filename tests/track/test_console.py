"""Console output on a terminal (a real pty) and elsewhere."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from tests.support.forked import quick
from tests.support.runs import ROOT
from train.track import console as console_module
from train.track.console import EtaEstimator, GuardedConsole, format_metrics, open_console

SAID = """
import sys, time, warnings, logging
from pathlib import Path
from train.track.track_config import TrackConfig
from train.track.logs import setup_logging
from train.track.tracker import Tracker
from tests.track.conftest import run_info

directory = Path(sys.argv[1])
info = run_info(directory, total_steps=40, start_step=10)
setup_logging(directory, 0, 1, "INFO")
tracker = Tracker(TrackConfig(console=sys.argv[2]), info, is_main=True, sinks=[])
tracker.info("the run begins")
for step in range(11, 41):
    time.sleep(0.03)
    tracker.progress(step)
    tracker.log(step, {
        "train/loss": 100.0 / step, "train/learning_rate": 3e-4,
        "speed/samples_per_second": 1234.5, "speed/tokens_per_second": 56789.0,
    })
    if step == 20:
        tracker.log(20, {"eval/loss": 0.25})
        tracker.report(20, {"sample": "clear \\x1b[2J the screen"})
    if step == 30:
        tracker.warn("look here")
        warnings.warn("a library is worried")
        logging.getLogger("library").error("a library has failed\\nat length")
        logging.getLogger("library").info("unimportant")
        print("the user's own print")
tracker.info("the run ends")
tracker.close()
"""


def on_terminal(directory, kind="auto", columns=80, term="xterm"):
    """All bytes that reach a terminal."""
    program = quick([sys.executable, "-c", SAID, str(directory), kind])
    # Set explicitly: readline, which pytest imports, sets COLUMNS in this process.
    env = {k: v for k, v in program["env"].items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.chdir(ROOT)
        os.execve(program["args"][0], program["args"], {**env, "TERM": term})
    shown = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # a pty raises this when the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, shown.decode()
    return shown.decode()


def not_on_terminal(directory, kind="auto"):
    done = subprocess.run(
        **quick([sys.executable, "-c", SAID, str(directory), kind]),
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def lines(shown):
    """The lines that remain on the terminal; of overwritten lines the last version."""
    kept = []
    for line in shown.replace("\r\n", "\n").split("\n"):
        drawn = [ESCAPE.sub("", part) for part in re.split(r"\r|\x1b\[2K", line)]
        kept.append(next((part.rstrip() for part in reversed(drawn) if part.strip()), ""))
    return kept


@pytest.fixture(scope="module", params=[66, 80])
def shown(request, tmp_path_factory):
    return on_terminal(tmp_path_factory.mktemp("bar"), columns=request.param), request.param


def test_a_terminal_has_a_bar(shown):
    text, columns = shown
    frames = [
        ESCAPE.sub("", f).strip() for f in re.split(r"[\r\n]+", text) if "━" in ESCAPE.sub("", f)
    ]
    assert len(frames) > 3, "the bar is not redrawn"
    too_long = [frame for frame in frames if len(frame) > columns]
    assert too_long == [], "frames are wider than the terminal"
    middle = frames[len(frames) // 2]
    assert re.match(r"\d+/40 ", middle)
    assert re.search(r"loss \d+\.\d+ lr 3\.0e-04 1\.2k samples/s", middle)
    assert re.search(r"\d:\d\d eta \d:\d\d$", middle)
    assert ("56.8k tokens/s" in middle) == (columns == 80), "values that do not fit must be omitted"
    drawn = ESCAPE.sub("", text).splitlines()
    assert all("━" in line for line in drawn if "tokens" in line), (
        "the bar continues on a second line"
    )
    assert "40/40" in frames[-1]
    assert "loss 2.5" in frames[-1]


def test_texts_are_printed_above_the_bar_and_complete(shown):
    kept = lines(shown[0])
    said = [
        "the run begins",
        "step 20/40  eval/loss 0.2500",
        "sample at step 20:",
        "clear \N{REPLACEMENT CHARACTER}[2J the screen",
        "warning: look here",
        "error: a library has failed",
        "the user's own print",
        "the run ends",
    ]
    places = [kept.index(line) for line in said]
    assert places == sorted(places)
    (worried,) = [line for line in kept if "a library is worried" in line]
    assert worried.startswith("warning: ")
    assert not [line for line in kept if "unimportant" in line or "at length" in line]
    (bar,) = [number for number, line in enumerate(kept) if "━" in line]
    assert places[-2] < bar < places[-1], "only the last state of the bar must stay"


def test_the_cursor_is_shown_again(shown):
    assert shown[0].rindex("\x1b[?25h") > shown[0].rindex("\x1b[?25l")


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "dumb terminal"])
def test_without_a_terminal_there_are_plain_lines(tmp_path, terminal):
    if terminal:
        out = on_terminal(tmp_path, term="dumb").replace("\r\n", "\n")
    else:
        done = not_on_terminal(tmp_path)
        out = done.stdout
        error, worried, failed = done.stderr.splitlines()
        assert error == "warning: look here"
        assert worried.endswith("UserWarning: a library is worried")
        assert failed == "error: a library has failed"
    assert "\x1b" not in out
    assert "\r" not in out
    out = out.splitlines()
    assert out[0] == "the run begins"
    assert out[-1] == "the run ends"
    numbers = "lr 3.0e-04  1.2k samples/s  56.8k tokens/s"
    assert f"step 11/40  loss 9.0909  {numbers}" in out, (
        "there must be no eta before the speed is known"
    )
    assert any(
        re.fullmatch(rf"step 25/40  loss 4.0000  {numbers}  eta 0:0\d", line) for line in out
    )
    assert "step 20/40  eval/loss 0.2500" in out
    assert sum(line.startswith("step ") for line in out) == 31


def test_quiet_shows_only_warnings(tmp_path):
    done = not_on_terminal(tmp_path, "quiet")
    assert done.stdout == "the user's own print\n"
    assert "warning: look here" in done.stderr


def test_a_closed_pipe_does_not_stop_the_run(tmp_path):
    """As in ``fit | head -1``. Other prints do not stop it either, once the console has failed."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        done = subprocess.run(
            **quick([sys.executable, "-c", SAID, str(tmp_path), "plain"]),
            cwd=ROOT, stdout=out, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr.count("Broken pipe") == 1
    assert "Traceback" not in done.stderr
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 30


def test_any_character_can_be_shown(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SAID.replace("the run begins", "\N{SNOWMAN}"), str(tmp_path), "plain"],
        cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout.startswith("\\u2603\n")
    assert done.stdout.endswith("the run ends\n")


def test_a_console_that_fails_is_dropped(caplog):
    class Broken:
        def print(self, *_):
            raise RuntimeError("no room for that")

        log = progress = close = print

    console = GuardedConsole(Broken())
    console.print("one")
    console.log(1, {})
    console.progress(1)
    console.close()
    assert [r.message for r in caplog.records if "no room for that" in r.message] == [
        "The console failed and is disabled: RuntimeError('no room for that')"
    ]


@pytest.mark.parametrize(
    ("kind", "terminal", "shown"),
    [
        ("auto", False, "lines"), ("auto", True, "bar"), ("bar", False, "bar"),
        ("plain", True, "lines"), ("quiet", True, "nothing"),
    ],
)  # fmt: skip
def test_the_kind_follows_the_terminal(monkeypatch, kind, terminal, shown):
    """A bar moves with each step; lines come only where metrics are logged."""
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout", stream)
    console = open_console(kind, "samples", 10, 0)
    console.progress(7)
    console.log(7, {"train/loss": 1.5})
    console.close()
    said = stream.getvalue()
    assert ("loss 1.5000" in said) == (shown != "nothing")
    assert said.startswith("step 7/10  loss 1.5000") == (shown == "lines")


def test_a_forked_worker_prints_past_the_bar(monkeypatch):
    """The bar's lock may be held by a thread that does not exist in the worker."""
    from rich.console import Console
    from rich.file_proxy import FileProxy

    real = sys.stdout
    monkeypatch.setattr("sys.stdout", FileProxy(Console(file=real), real))
    worker = os.fork()
    if worker == 0:
        os._exit(0 if sys.stdout is real else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 0
    assert isinstance(sys.stdout, FileProxy)


@pytest.fixture
def clock(monkeypatch):
    times = iter([])
    monkeypatch.setattr(console_module.time, "monotonic", lambda: next(times))

    def set_times(*values):
        nonlocal times
        times = iter(values)

    return set_times


def test_the_eta_counts_steps_of_this_attempt_after_the_first(clock):
    clock(1000.0, 1002.0)
    pace = EtaEstimator(1000)
    assert pace.seconds_left(901) is None
    assert pace.seconds_left(903) == pytest.approx(97.0)


def test_the_eta_follows_a_change_of_speed_within_minutes(clock):
    clock(0.0, 100.0, 110.0, 300.0)
    pace = EtaEstimator(2000)
    for step in (0, 100, 200):  # 1 s each, then 0.1 s
        left = pace.seconds_left(step)
    assert 0.1 * 1800 < left < 0.6 * 1800
    assert pace.seconds_left(2000 - 10) == pytest.approx(1.06, rel=0.1)


def test_format_metrics():
    metrics = {
        "train/loss": 2.34567, "train/learning_rate": 0.0003, "speed/samples_per_second": 99.94,
        "speed/tokens_per_second": 1.5e6, "train/skipped_steps": 2.0, "memory/rss_gib": 1.0,
    }  # fmt: skip
    line = "loss 2.3457  lr 3.0e-04  99.9 samples/s"
    assert format_metrics(metrics, "tokens") == f"{line}  1.5M tokens/s  skipped 2"
    assert format_metrics(metrics, "samples") == f"{line}  skipped 2"
    assert (
        format_metrics({"eval/loss": 1.0, "eval/b": 0.5}, "x") == "eval/loss 1.0000  eval/b 0.5000"
    )
    assert format_metrics({"train/loss": float("nan")}, "x") == "loss nan"
