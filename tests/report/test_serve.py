"""``report --watch``: live on this machine only, bounded, and over when the run is."""

import http.client
import json
import threading
import time

import pytest

from tests.support.report_files import START, write_run
from tests.support.run_files import write, write_lines
from train.exits import UsageError
from train.report import serve as serving
from train.report.serve import HOST, open_server


@pytest.fixture
def running(tmp_path):
    """A run that seems to be in progress: another host has its lock, and a heartbeat is fresh."""
    write_run(tmp_path)
    (tmp_path / "finished.json").unlink()
    attempt = {"attempt": 1, "time": START, "resumed_from_step": None, "world_size": 1}
    write_lines(tmp_path / "attempts.jsonl", [attempt])
    (tmp_path / "heartbeats").mkdir()
    (tmp_path / "lock").write_text("process 1 on another-host since 2026-01-01 00:00:00")
    write(tmp_path / "heartbeats" / "rank-0.json", {})
    return tmp_path


@pytest.fixture
def server(running, monkeypatch):
    monkeypatch.setattr(serving, "READ_EVERY", 0.0)
    made = open_server([str(running)], 0)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def get(server, path="/", method="GET", **headers):
    connection = http.client.HTTPConnection(HOST, server.server_port, timeout=20)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_page_is_live_and_its_data_follow_the_run(server, running):
    status, page = get(server)
    assert status == 200
    assert "connect-src &#x27;self&#x27;" in page
    assert "in progress" in page
    first = json.loads(get(server, "/data.json?since=")[1])
    assert not first["over"]
    assert first["drawn"]["figures"][0]["title"] == "Loss"
    version = first["version"]
    assert "drawn" not in json.loads(get(server, f"/data.json?since={version}")[1])
    with (running / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 402, "time": START + 900, "train/loss": 0.125}) + "\n")
    later = json.loads(get(server, f"/data.json?since={version}")[1])
    assert later["drawn"]["figures"][0]["series"][0]["y"][-1] == 0.125
    assert "402" in later["html"]["overview"]
    write(running / "finished.json", {"step": 402})
    assert json.loads(get(server, "/data.json?since=")[1])["over"]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil:80"])
def test_another_host_name_is_refused(server, host):
    status, page = get(server, Host=host)
    assert status == 403
    assert "in progress" not in page


def test_only_the_page_and_its_data_are_served(server):
    assert get(server, "/run.json")[0] == 404
    assert get(server, "/../../etc/passwd")[0] == 404
    assert get(server, method="POST")[0] == 501
    assert get(server, Host=f"localhost:{server.server_port}")[0] == 200


@pytest.mark.slow
def test_connections_beyond_the_limit_are_closed(server):
    idle = [http.client.HTTPConnection(HOST, server.server_port) for _ in range(20)]
    for connection in idle:
        connection.connect()
    closed = 0
    for connection in idle:
        connection.sock.settimeout(0.2)
        try:
            closed += connection.sock.recv(1) == b""
        except ConnectionResetError:
            closed += 1
        except TimeoutError:
            pass
    assert closed == 20 - serving.CONNECTIONS
    for connection in idle:
        connection.close()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            assert get(server)[0] == 200
            break
        except (OSError, http.client.HTTPException):
            time.sleep(0.05)
    else:
        pytest.fail("the server does not answer any more")


def test_a_run_that_has_ended_is_not_watched(running):
    (running / "heartbeats" / "rank-0.json").unlink()
    (running / "lock").write_text("")  # released
    with pytest.raises(UsageError, match="No run is in progress"):
        open_server([str(running)], 0)


def test_a_port_in_use_is_one_sentence(server, running):
    with pytest.raises(UsageError, match=f"--port is {server.server_port}"):
        open_server([str(running)], server.server_port)
