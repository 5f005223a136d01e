"""NCCL's RAS and torch's flight recorder, with fakes of both."""

import os
import socket
import threading
import time

import pytest

from train.process import nccl_reports
from train.process.nccl_reports import flight_recorder, ras_status


@pytest.fixture
def server():
    """Starts a server that calls a function with the connection of its only client."""
    listening = socket.create_server(("127.0.0.1", 0))
    threads = []

    def start(answer):
        def serve():
            client, _ = listening.accept()
            with client, client.makefile("rb") as lines:
                answer(client, lines)

        threads.append(threading.Thread(target=serve, daemon=True))
        threads[-1].start()
        return {"NCCL_RAS_ADDR": f"127.0.0.1:{listening.getsockname()[1]}"}

    yield start
    listening.close()
    for thread in threads:
        thread.join(10)


def ras(text):
    def answer(client, lines):
        assert lines.readline().startswith(b"TIMEOUT ")
        client.sendall(b"OK\n")
        assert lines.readline() == b"VERBOSE STATUS\n"
        client.sendall(text)

    return answer


def test_the_state_that_ras_reports(server):
    environ = server(ras(b"Job summary\n" + b"  rank 3: INCOMPLETE\n" * 1000))
    status = ras_status(environ)
    assert status.startswith("Job summary\n  rank 3: INCOMPLETE\n")
    assert status.endswith("INCOMPLETE"), "all parts, without what separates the commands"


def test_an_endless_report_is_cut(server):
    status = ras_status(server(ras(b"x" * (1 << 20))))
    assert len(status) == 1 << 16


def test_a_report_that_does_not_end_is_what_came_in_time(server):
    def stalls(client, lines):
        ras(b"a part")(client, lines)
        lines.readline()  # until the client leaves

    assert ras_status(server(stalls), seconds=0.3) == "a part"


def test_another_program_at_the_port(server):
    assert ras_status(server(lambda client, lines: client.sendall(b"HTTP/1.1 400\r\n"))) is None


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:x", "127.0.0.1", "", "[::1]:99999"])
def test_nothing_at_the_address(address):
    assert ras_status({"NCCL_RAS_ADDR": address}) is None


def test_ras_that_is_turned_off_is_not_asked(server):
    environ = server(ras(b"state"))
    assert ras_status({**environ, "NCCL_RAS_ENABLE": "0"}) is None
    assert ras_status(environ) == "state"


@pytest.mark.parametrize("name", ["TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"])
def test_the_flight_recorder_is_asked_by_its_pipe(tmp_path, name):
    pipe = tmp_path / "pipe-3.pipe"
    os.mkfifo(pipe)
    environ = {"TORCH_NCCL_DEBUG_INFO_PIPE_FILE": f"{tmp_path}/pipe-", name: f"{tmp_path}/trace-"}
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # as torch does

    def dump():
        while not os.read(reader, 10):
            time.sleep(0.01)
        (tmp_path / "trace-3").write_bytes(b"dump")

    thread = threading.Thread(target=dump)
    thread.start()
    assert flight_recorder(environ, 3, seconds=30.0) == f"{tmp_path}/trace-3"
    thread.join()
    os.close(reader)


def test_a_dump_that_torch_has_made_by_itself_is_named(tmp_path):
    environ = {"TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/trace-"}
    assert flight_recorder(environ, 3) is None
    (tmp_path / "trace-3").write_bytes(b"dump")
    assert flight_recorder(environ, 3) == f"{tmp_path}/trace-3"
    assert flight_recorder({}, 3) is None


def test_a_pipe_that_nobody_reads_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe-3.pipe")
    environ = {"TORCH_NCCL_DEBUG_INFO_PIPE_FILE": f"{tmp_path}/pipe-"}
    assert flight_recorder(environ, 3, seconds=30.0) is None


def test_a_process_on_the_cpu_asks_nobody():
    assert not nccl_reports.uses_gpu()
