"""``logs`` merges the log files of all ranks, also while they are written and rotated."""

import itertools
import os

import pytest

import train.commands.logs as command
from tests.support.run_files import here, make_run
from train.cli import main
from train.runs.log_reader import LogReader


def head(second, rank, text, *, level="INFO", attempt=1):
    time = f"2026-11-26 10:{second // 60:02}:{second % 60:02},000"
    return f"{time} {level} attempt {attempt} rank {rank} train: {text}\n"


def log_file(run, name, *lines, add=False):
    (run / "logs").mkdir(exist_ok=True)
    with (run / "logs" / name).open("a" if add else "w") as file:
        file.write("".join(lines))


def rotate(run, rank):
    """As logging's RotatingFileHandler does, with two older files."""
    base = run / "logs" / f"rank-{rank}.log"
    for number in (1, 0):
        old = base.with_name(f"{base.name}.{number}") if number else base
        if old.exists():
            old.rename(base.with_name(f"{base.name}.{number + 1}"))


@pytest.fixture
def run(tmp_path):
    path = make_run(tmp_path / "run", attempts=[{}, {}])
    log_file(
        path, "rank-0.log",
        head(1, 0, "one"), head(4, 0, "four", level="ERROR"), "Traceback:\n", "  a line\n",
        head(6, 0, "six", attempt=2),
    )  # fmt: skip
    log_file(
        path, "rank-1.log", head(3, 1, "three", level="WARNING"), head(5, 1, "five", attempt=2)
    )
    return path


def printed(capsys, *words):
    """The words after the last colon of each line, with the rank before the line."""
    assert main(["logs", *map(str, words)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [line[:4] + line.rpartition("train: ")[2].removeprefix(line[:4]) for line in lines]


ALL = ["[0] one", "[1] three", "[0] four", "[0] Traceback:", "[0]   a line", "[1] five", "[0] six"]


def test_all_ranks_by_time(run, capsys):
    assert printed(capsys, run) == ALL


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--rank", "1"], [1, 5]),
        (["--rank", "0", "--rank", "1"], range(7)),
        (["--attempt", "2"], [5, 6]),
        (["--attempt", "-1"], [5, 6]),
        (["--attempt", "-2"], range(5)),
        (["--level", "WARNING"], range(1, 5)),
        (["--level", "error"], range(2, 5)),
        (["--level", "ERROR", "--attempt", "2"], []),
    ],
)
def test_selections(run, capsys, words, expected):
    assert printed(capsys, run, *words) == [ALL[number] for number in expected]


def test_rotated_files_come_first(run, capsys):
    log_file(run, "rank-0.log.1", head(0, 0, "zero"))
    log_file(run, "rank-0.log.2", "the rest of a message\n")
    log_file(run, "rank-0.log.old", head(0, 0, "not a log file"))
    assert printed(capsys, run)[:3] == ["[0] the rest of a message", "[0] zero", "[0] one"]


def test_ranks_are_aligned_and_control_characters_are_escapes(run, capsys):
    log_file(run, "rank-10.log", head(9, 10, "\x1b[2J\x07 bell"), "cut off")
    assert main(["logs", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[ 0] 2026-")
    assert lines[-2].startswith("[10] 2026-")
    assert lines[-2].endswith("\\x1b[2J\\x07 bell")
    assert lines[-1] == "[10] cut off"


def texts(reader, *, at_end=False):
    lines = [line.text.decode() for line in reader.new_lines(at_end=at_end)]
    return [line.rpartition("train: ")[2] for line in lines]


def test_following_reads_what_is_added_through_rotations(run):
    with LogReader(run) as reader:
        assert len(texts(reader)) == 7
        assert texts(reader) == []
        log_file(run, "rank-0.log", head(7, 0, "seven"), "half of", add=True)
        assert texts(reader) == ["seven"]
        log_file(run, "rank-0.log", " a line\n", add=True)
        rotate(run, 0)
        log_file(run, "rank-0.log", head(8, 0, "eight"))
        rotate(run, 0)
        log_file(run, "rank-0.log", head(9, 0, "nine"))
        assert texts(reader) == ["half of a line", "eight", "nine"]
        for number in range(10, 14):  # more rotations than there are old files
            rotate(run, 0)
            log_file(run, "rank-0.log", head(number, 0, str(number)))
        assert texts(reader) == ["11", "12", "13"]


def test_following_finds_ranks_that_start_later(run):
    with LogReader(run) as reader:
        texts(reader)
        log_file(run, "rank-2.log", head(7, 2, "new"))
        log_file(run, "rank-0.log", head(8, 0, "later"), add=True)
        assert texts(reader) == ["new", "later"]


def test_following_reads_a_file_that_was_truncated_or_replaced(run):
    with LogReader(run, [1]) as reader:
        texts(reader)
        log_file(run, "rank-1.log", head(7, 1, "x"))
        assert texts(reader) == ["x"]
        (run / "logs/rank-1.log").unlink()
        assert texts(reader) == []
        log_file(run, "rank-1.log", head(8, 1, "y"), "no end")
        assert texts(reader) == ["y"]
        assert texts(reader, at_end=True) == ["no end"]


def test_a_rotation_while_the_files_are_opened_gives_each_line_once(run, monkeypatch):
    import train.runs.log_files as files

    opening, count = files.open_regular, itertools.count()

    def rotating(path, *rest):
        descriptor = opening(path, *rest)
        if next(count) == 0:
            rotate(run, 0)
            log_file(run, "rank-0.log", head(7, 0, "seven"))
        return descriptor

    log_file(run, "rank-0.log.1", head(0, 0, "zero"))
    monkeypatch.setattr(files, "open_regular", rotating)
    with LogReader(run, [0]) as reader:
        found = texts(reader) + texts(reader)
    assert found == ["zero", "one", "four", "Traceback:", "  a line", "six", "seven"]


def test_follow_ends_with_the_run(run, capsys, monkeypatch):
    monkeypatch.setattr(command, "_LOOK", 0.0)
    host, pid = here()
    (run / "lock").write_text(f"process {pid} on {host} since 2026-11-26 10:00:00")
    left = [
        lambda: log_file(run, "rank-0.log", head(7, 0, "seven"), add=True),
        lambda: log_file(run, "rank-0.log", head(8, 0, "eight"), add=True),
        lambda: (run / "lock").write_text(""),
        lambda: log_file(run, "rank-1.log", head(9, 1, "the end"), add=True),
    ]
    monkeypatch.setattr(command.time, "sleep", lambda _: left.pop(0)())
    assert main(["logs", "-f", str(run)]) == 0
    said = capsys.readouterr()
    lines = [line.rpartition("train: ")[2] for line in said.out.splitlines()]
    assert lines[-3:] == ["seven", "eight", "the end"]
    assert said.err == "isorun: the run is not in progress: dead.\n"


def test_ctrl_c_ends_following_with_130(run, capsys, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", interrupt)
    assert main(["logs", "-f", str(run)]) == 130
    said = capsys.readouterr()
    assert said.err == "isorun: stopped.\n"
    assert len(said.out.splitlines()) == 7


def test_a_closed_pipe_is_no_error(run, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    log_file(run, "rank-0.log", *(head(10, 0, "x" * 1000) for _ in range(100)))
    with os.fdopen(writer, "w") as unread:
        monkeypatch.setattr("sys.stdout", unread)
        assert main(["logs", str(run)]) == 0
        monkeypatch.undo()


def test_a_file_that_cannot_be_read_is_left_out(run, capsys):
    (run / "logs/rank-0.log").unlink()
    (run / "logs/rank-0.log").symlink_to("/dev/zero")
    assert main(["logs", str(run)]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2
    assert "rank-0.log cannot be read: it is a symbolic link" in said.err


def test_following_reports_such_a_file_once(run, capsys):
    (run / "logs/rank-1.log").unlink()
    (run / "logs/rank-1.log").mkdir()
    with LogReader(run) as reader:
        assert len(texts(reader)) == 5
        assert texts(reader) == []
    assert capsys.readouterr().err.count("rank-1.log cannot be read") == 1


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nowhere"], 64, "There is no run in nowhere"),
        (["run", "--rank", "5"], 64, "--rank is 5, but run has logs of ranks 0 to 1."),
        (["run", "--rank", "-1"], 64, "--rank is -1"),
        (["run", "--attempt", "3"], 64, "--attempt is 3, but the run has 2 attempts"),
        (["run", "--attempt", "0"], 64, "--attempt is 0"),
        (["run", "--level", "LOUD"], 64, "invalid choice: 'LOUD'"),
        (["linked"], 76, "it is a symbolic link, not a directory"),
        ([], 64, "the following arguments are required: RUN"),
    ],
)
def test_bad_input_is_one_sentence(run, monkeypatch, capsys, words, code, message):
    monkeypatch.chdir(run.parent)
    make_run(run.parent / "linked")
    (run.parent / "linked/logs").symlink_to(run / "logs")
    assert main(["logs", *words]) == code
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert message.lower() in line.lower()
    assert printed.out == ""


def test_a_run_without_logs(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert main(["logs", str(run)]) == 0
    assert "has no log files" in capsys.readouterr().err
