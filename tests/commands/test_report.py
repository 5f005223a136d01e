"""``report`` on the command line."""

import os

import pytest

from tests.support.report_files import write_run
from train.cli import main


def test_a_report_is_written_and_replaced(tmp_path, capsys):
    run, target = write_run(tmp_path / "run"), tmp_path / "out.html"
    for _ in range(2):
        assert main(["report", str(run), "--to", str(target)]) == 0
        assert capsys.readouterr().out == f"{target}\n"
    assert target.read_text().startswith("<!doctype html>")
    before = sorted(path.name for path in run.iterdir())
    assert before == ["attempts.jsonl", "config.json", "finished.json", "metrics.jsonl", "run.json"]


def test_a_full_disk_is_worth_a_retry(tmp_path, capsys, monkeypatch):
    def fail(target, _text):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr("train.report.target.replace_text", fail)
    run = write_run(tmp_path / "run")
    assert main(["report", str(run), "--to", str(tmp_path / "out.html")]) == 75
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{}/nothing", "--to", "{}/out.html"], "There is no run in"),
        (["{}/run", "--to", "{}"], "cannot be written"),
        (["{}/run", "--to", "{}/no/such/out.html"], "cannot be written"),
        (["{}/run", "--to", "{}/run/metrics.jsonl"], "exists and is no report"),
        (["{}/run", "--to", "/dev/null"], "cannot be written"),
        (["{}/run", "--port", "80"], "--watch"),
        (["{}/run", "--watch", "--port", "99999"], "--port"),
        (["{}/run", "--watch"], "No run is in progress"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, capsys, words, said):
    write_run(tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert main(["report", *(word.format(tmp_path) for word in words)]) == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_damaged_run_is_refused(tmp_path, capsys):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("{")
    assert main(["report", str(tmp_path / "run"), "--to", str(tmp_path / "out.html")]) == 76
    (tmp_path / "run" / "run.json").unlink()
    os.mkfifo(tmp_path / "run" / "run.json")
    assert main(["report", str(tmp_path / "run"), "--to", str(tmp_path / "out.html")]) == 76
    assert "Traceback" not in capsys.readouterr().err
