"""The doctor in one process: the checks that need no other node."""

import http.server
import subprocess
import sys
import threading

import pytest

from launch.contract import usable_cores
from tests.faults.mounts import fill, small_disk
from tests.launch.doctor.doctors import (
    FIT,
    clean,
    doctor,
    in_mount_namespace,
    why_no_mount_namespace,
)
from tests.support.lanes import slow
from tests.support.runs import ROOT, free_port

DIGITS = ["--", "python", "-m", "train", "fit", "--config", "configs/digits.yaml"]


def test_a_healthy_node_has_a_row_for_each_check_and_no_files_are_left(tmp_path):
    told = doctor(tmp_path, command=[*FIT, f"run.dir={tmp_path}/run"])
    lines = told.output[0].splitlines()
    assert lines[0].startswith("Preflight (quick): 1 node, 1 process, ")
    assert lines[-1].endswith("the run can start (exit 0)")
    rows = [line for line in lines[1:-1] if not line.startswith(" ")]
    assert len(rows) == len(told.report["findings"])
    assert "\x1b" not in told.output[0], "there must be no colours without a terminal"
    for check in ("devices", "threads", "limits", "memory", "versions", "run directory"):
        assert told.only(check, "ok")["node"] == told.report["nodes"][0]
    assert told.only("shared memory", "ok")["text"] == "not needed: loader.workers is 0"
    assert f"torch {__import__('torch').__version__}" in told.only("versions", "ok")["text"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.slow
def test_without_a_training_command_only_checks_without_config_run(tmp_path):
    told = doctor(tmp_path, command=[])
    assert told.only("versions", "ok")
    assert not told.found("run directory")
    assert not told.found("W&B")


@pytest.mark.slow
def test_a_command_other_than_a_training_is_not_parsed(tmp_path):
    told = doctor(tmp_path, command=["--", "python", "other.py", "--nonsense"])
    assert told.only("versions", "ok")
    assert not told.found("config")


def test_a_config_error_is_a_finding_beside_others(tmp_path):
    told = doctor(tmp_path, command=[*FIT, "optim.lrr=3e-4"], expect=64)
    failed = told.only("config", "failed")
    assert "optim.lrr is not a known key" in failed["text"]
    assert failed["code"] == 64
    assert told.only("memory", "ok")
    assert told.output[0].splitlines()[-1].endswith("a setting must be changed (exit 64)")


@pytest.mark.parametrize("variable", ["GLOO_SOCKET_IFNAME", slow("NCCL_SOCKET_IFNAME")])
def test_an_interface_that_does_not_exist(tmp_path, variable):
    told = doctor(tmp_path, env={variable: "nonesuch7"}, expect=64)
    failed = told.only("interfaces", "failed")
    assert f"{variable} is 'nonesuch7', which names no interface" in failed["text"]
    assert "lo" in failed["text"]
    assert failed["advice"] == f"correct or unset {variable}"


@pytest.mark.slow
def test_a_run_directory_that_cannot_be_written(tmp_path):
    told = doctor(tmp_path, command=[*FIT, "run.dir=/proc/isorun"], expect=64)
    failed = told.only("run directory", "failed")
    assert "run.dir is '/proc/isorun' (from command line)" in failed["text"]


def test_a_full_disk_is_an_infrastructure_failure(tmp_path):
    with small_disk(tmp_path / "disk", "size=1m") as disk:
        fill(disk)
        told = doctor(tmp_path, command=[*FIT, f"run.dir={disk}/run"], expect=75)
    assert "No space left" in told.only("run directory", "failed")["text"]
    assert told.only("run directory", "failed")["advice"].startswith("free space")


@pytest.mark.slow
def test_too_little_space_for_checkpoints_by_the_number_of_parameters(tmp_path):
    with small_disk(tmp_path / "disk", "size=4m") as disk:
        command = [*DIGITS, f"run.dir={disk}/run"]
        assert doctor(tmp_path, command=command).only("free space", "skipped")
        told = doctor(tmp_path, "--level", "full", command=command, expect=75)
    failed = told.only("free space", "failed")
    assert "3 more checkpoint(s) of 1.7 MiB (computed from its parameters)" in failed["text"]


@pytest.mark.slow
def test_the_estimated_size_of_a_checkpoint_is_close_to_its_actual_size(tmp_path):
    command = [*DIGITS, f"run.dir={tmp_path}/run", "length.epochs=1"]
    told = doctor(tmp_path, "--level", "full", command=command)
    estimated = told.only("free space", "ok")["values"]["checkpoint_bytes"]
    subprocess.run([sys.executable, *command[2:]], cwd=ROOT, env=clean(), check=True)
    told = doctor(tmp_path, command=command)
    found = told.only("free space", "ok")
    assert "(size of the newest)" in found["text"]
    assert found["values"]["checkpoint_bytes"] == pytest.approx(estimated, rel=0.05)


def test_full_measures_the_disk_and_a_sample(tmp_path):
    command = [*FIT, f"run.dir={tmp_path}/run", "loader.workers=2"]
    told = doctor(tmp_path, "--level", "full", command=command)
    speed = told.only("disk speed", told.found("disk speed")[0]["status"])["values"]
    assert min(speed["write_bytes_per_second"], speed["read_bytes_per_second"]) > 0
    # A sample of the tiny task has 8 + 4 + 4 floats.
    assert "12 samples of 64 B (measured)" in told.only("shared memory", "ok")["text"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.slow
@pytest.mark.skipif(why_no_mount_namespace() is not None, reason=str(why_no_mount_namespace()))
@pytest.mark.parametrize(
    ("size", "level", "status", "code"),
    [
        ("16k", "quick", "failed", 64),  # less than a page for each micro-batch
        slow(("4m", "quick", "warning", 0)),  # too small for image samples
        slow(("4m", "full", "ok", 0)),  # enough for the measured samples
    ],
)
def test_shared_memory_against_data_workers(tmp_path, size, level, status, code):
    told = doctor(
        tmp_path, "--level", level, expect=code,
        command=[*FIT, f"run.dir={tmp_path}/run", "loader.workers=2"],
        before=[in_mount_namespace(f"mount -t tmpfs -o size={size} tmpfs /dev/shm")],
    )  # fmt: skip
    found = told.only("shared memory", status)
    assert "1 rank(s) x 2 workers x 3 micro-batches" in found["text"]
    assert status == "ok" or "--shm-size" in found["advice"]


def test_an_unreachable_wandb_is_only_a_warning(tmp_path):
    command = [*FIT, f"run.dir={tmp_path}/run", "track.wandb=online"]
    url = f"http://127.0.0.1:{free_port()}"
    told = doctor(tmp_path, command=command, env={"WANDB_BASE_URL": url})
    assert f"{url} cannot be reached" in told.only("W&B", "warning")["text"]
    assert "offline" in told.only("W&B", "warning")["advice"]


@pytest.mark.slow
def test_a_wandb_server_that_answers(tmp_path):
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), http.server.BaseHTTPRequestHandler
    )  # it answers 501
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [*FIT, f"run.dir={tmp_path}/run", "track.wandb=online"]
    env = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}"}
    assert doctor(tmp_path, command=command, env=env).only("W&B", "ok")
    server.shutdown()


@pytest.mark.slow
def test_more_threads_than_cores(tmp_path):
    cores = int(usable_cores())
    told = doctor(tmp_path, env={"OMP_NUM_THREADS": str(cores + 1)})
    assert told.only("threads", "warning")["text"].startswith(f"1 x {cores + 1} threads")
    assert "set OMP_NUM_THREADS to" in told.only("threads", "warning")["advice"]


@pytest.mark.slow
def test_too_few_open_files(tmp_path):
    told = doctor(tmp_path, before=[["sh", "-c", 'ulimit -Sn 200 && exec "$@"', "sh"]])
    found = told.only("limits", "warning")
    assert "a process may open 200 files" in found["text"]
    assert found["advice"].startswith("raise the limit: ulimit -n ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--level", "deep"], "Argument --level: invalid choice: 'deep'"),
        (["--wait", "0"], "--wait is 0"),
        (["--wait", "nan"], "--wait is nan"),
        (["--jsn", "x"], "--jsn"),
    ],
)
def test_an_invalid_argument_is_one_sentence(words, said):
    done = subprocess.run(
        [sys.executable, "-m", "launch.doctor", *words],
        cwd=ROOT, env=clean(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 64
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_report_that_cannot_be_written(tmp_path):
    told = doctor(tmp_path, "--json", str(tmp_path / "no" / "folder.json"), expect=64)
    assert "--json is" in told.errors[0]
    assert "the run can start" in told.output[0], "the table is not printed"
