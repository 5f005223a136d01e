import errno
import logging
import re
import warnings

import pytest

from train.track import logs
from train.track.logs import setup_logging


def text(directory, rank=0):
    return (directory / "logs" / f"rank-{rank}.log").read_text()


def test_each_line_has_time_level_attempt_and_rank(tmp_path, capsys):
    setup_logging(tmp_path, 3, 2, "INFO")
    logging.getLogger("train").info("hello")
    expected = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO attempt 2 rank 3 train: hello\n"
    assert re.fullmatch(expected, text(tmp_path, 3))


def test_only_rank_0_prints_warnings(tmp_path, capsys):
    for rank in (1, 0):
        setup_logging(tmp_path, rank, 1, "INFO")
        logging.getLogger("train").info("by the way")
        logging.getLogger("train").warning("careful")
        assert "careful" in text(tmp_path, rank)
        assert capsys.readouterr().err == ("warning: careful\n" if rank == 0 else "")


def test_repeated_warnings_are_shown_once_and_logged_each_time(tmp_path, capsys):
    setup_logging(tmp_path, 0, 1, "INFO")
    for _ in range(3):
        logging.getLogger("library").warning("again\nand again")
        logging.getLogger("train").warning("full")
    err = capsys.readouterr().err.splitlines()
    assert err.count("warning: again") == 1
    assert err.count("warning: full") == 3
    assert text(tmp_path).count("library: again\nand again") == 3


def test_pythons_warnings_are_captured(tmp_path, capsys):
    setup_logging(tmp_path, 0, 1, "INFO")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)  # replaces the handler of pytest
        warnings.warn("worried", UserWarning, stacklevel=1)
    assert "UserWarning: worried" in text(tmp_path)
    assert re.fullmatch(r"warning: .*UserWarning: worried\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("level", "logged"),
    [
        ("DEBUG", ["debug", "info", "warning", "error"]),
        ("WARNING", ["warning", "error"]),
        ("ERROR", ["error"]),
    ],
)
def test_level(tmp_path, capsys, level, logged):
    """The level applies to the files; warnings are printed at any level, errors that the command
    line prints are not."""
    setup_logging(tmp_path, 0, 1, level)
    for name in ("debug", "info", "warning", "error"):
        getattr(logging.getLogger("train"), name)(name)
    assert [line.split()[-1] for line in text(tmp_path).splitlines()] == logged
    assert capsys.readouterr().err == "warning: warning\n"


def test_messages_of_libraries_are_logged_without_debug(tmp_path, capsys):
    setup_logging(tmp_path, 0, 1, "DEBUG")
    logging.getLogger("my_project").info("mine")
    logging.getLogger("my_project").debug("too much")
    assert "my_project: mine" in text(tmp_path)
    assert "too much" not in text(tmp_path)


def test_the_file_is_kept_across_attempts_and_rotated(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "_BYTES", 4000)
    for attempt in (1, 2):
        setup_logging(tmp_path, 0, attempt, "INFO")
        logging.getLogger("train").info("hello")
    assert text(tmp_path).count("hello") == 2, (
        "there must be one handler, and the file must be kept"
    )
    for number in range(200):
        logging.getLogger("train").info("line %d", number)
    names = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert names == ["rank-0.log", "rank-0.log.1", "rank-0.log.2"]
    assert "line 199" in text(tmp_path)
    assert all(path.stat().st_size <= 4000 for path in (tmp_path / "logs").iterdir())


class FullDisk:
    """A stream that cannot be written."""

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self):
        pass

    close = flush


def test_a_full_disk_prints_no_traceback(tmp_path, capfd):
    setup_logging(tmp_path, 0, 1, "INFO")
    (handler,) = [h for h in logging.getLogger().handlers if isinstance(h, logs._File)]
    handler.setStream(FullDisk())
    logging.getLogger("train").info("lost")
    logging.getLogger("train").warning("shown")
    assert capfd.readouterr().err == "warning: shown\n"


def test_a_closed_stderr_is_ignored(tmp_path, monkeypatch):
    setup_logging(tmp_path, 0, 1, "INFO")
    monkeypatch.setattr("sys.stderr", FullDisk())
    logging.getLogger("train").warning("kept")
    assert "kept" in text(tmp_path)
