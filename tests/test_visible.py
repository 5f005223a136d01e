"""Control characters of files are shown as escapes."""

import logging

import pytest

from train.command_line import log, say
from train.track.logs import setup_logging
from train.visible import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jx", "\\x1b[2Jx"), ("\x9b31m", "\\x9b31m"), ("a\rb", "a\\rb"), ("\x07\x7f\x00", "\\x07\\x7f\\x00"),
        ("\u202egnp", "\\u202egnp"), ("\u2028", "\\u2028"), ("a\r\nb\tc\n", "a\nb\tc\n"),
        ("Zürich – 東京 🙂", "Zürich – 東京 🙂"), ("C:\\x", "C:\\x"),
    ],
)  # fmt: skip
def test_a_text(text, shown):
    assert visible(text) == shown


def test_output_of_commands(capsys):
    say("\x1b]0;title\x07")
    log("\x1b[31mred")
    out, err = capsys.readouterr()
    assert out == "\\x1b]0;title\\x07\n"
    assert err == "isorun: \\x1b[31mred\n"


def test_errors_show_no_secret(capsys):
    log("cannot reach https://me:hunter2@host/x")
    assert capsys.readouterr().err == "isorun: cannot reach https://me:***@host/x\n"


def test_warnings_of_a_run_and_its_log_file(tmp_path, capsys):
    root = logging.getLogger()
    before = root.handlers[:], root.level
    setup_logging(tmp_path, 0, 1, "INFO")
    try:
        logging.getLogger("train").warning("lock of \x1b[2J, https://me:hunter2@host")
    finally:
        for handler in [h for h in root.handlers if h not in before[0]]:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(before[1])
        logging.captureWarnings(False)
    assert capsys.readouterr().err == "warning: lock of \\x1b[2J, https://me:***@host\n"
    text = (tmp_path / "logs/rank-0.log").read_text()
    assert "https://me:***@host" in text
    assert "hunter2" not in text
