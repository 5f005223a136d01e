"""The progress of a run in the status of its TrainJob."""

import shutil
import time

import pytest

from tests.track.trainer_server import TOKEN, TrainerServer, certificate

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
OFF = {"tensorboard": False, "wandb": "disabled"}


@pytest.fixture
def server(tmp_path, monkeypatch):
    made = TrainerServer(tmp_path)
    token = tmp_path / "token"
    token.write_text(TOKEN)
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", made.url)
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_CA_CERT", str(made.ca))
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(token))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # pods reach the trainer directly
    yield made
    made.stop()


def train(track, code=0, steps=(1, 10, 20), before_end=lambda: None, **changes):
    tracker = track(sinks=None, config=OFF, **changes)
    for step in steps:
        tracker.progress(step)
        tracker.log(step, {"train/loss": 1.0 / step, "x" * 65: 1.0})
    tracker.wait_until_open()
    before_end()
    tracker.end(code)
    tracker.close()


def values(status):
    return {metric["name"]: metric["value"] for metric in status["metrics"]}


def test_a_finished_run_is_at_100_percent(track, server):
    train(track)
    first, last = server.received[0], server.received[-1]
    assert (first["progressPercentage"], values(first)["train/loss"]) == (1, "1")
    assert (last["progressPercentage"], last["estimatedRemainingSeconds"]) == (100, 0)
    assert values(last) == {"train/loss": "0.05"}
    assert len(server.received) == 2, "requests in between would come too soon after another"


def test_a_stopped_run_says_how_far_it_got(track, server):
    train(track, code=143, start_step=40, steps=(41, 50))
    assert server.received[-1]["progressPercentage"] == 50
    assert values(server.received[-1])["train/loss"] == "0.02"


def test_numbers_that_json_lacks_are_texts(track, server):
    tracker = track(sinks=None, config=OFF)
    tracker.log(1, {"train/loss": float("nan"), **{f"m{n}": 1e300 * n for n in range(300)}})
    tracker.close()
    assert values(server.received[0])["train/loss"] == "nan"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((403, {"message": "Forbidden"}, {}), "HTTP 403, Forbidden"),
        ((500, "no object", {}), "HTTP 500"),
    ],
)
def test_a_refusal_is_told_once_and_the_run_goes_on(track, server, tmp_path, answer, said):
    server.answer = answer
    train(track)
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert log.count("The status of the TrainJob cannot be updated") == 1
    assert f"({said}); the training goes on" in log
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_redirection_gets_no_token(track, server, tmp_path):
    server.answer = (302, {}, {"Location": server.url})
    train(track)
    assert len(server.requests) == 2
    assert "(HTTP 302); the" in (tmp_path / "logs" / "rank-0.log").read_text()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("CA_CERT", "another", "certificate verify failed"),
        ("CA_CERT", "/gone", "No such file"),
        ("TOKEN", "", "KUBEFLOW_TRAINER_SERVER_TOKEN is not set"),
        ("TOKEN", "/gone", "No such file"),
        ("TOKEN", "two lines", "holds no token"),
        ("URL", "http://localhost/status", "must be an https:// address, but is 'http://localhost"),
        ("URL", "https://localhost:x/status", "Port could not be cast"),
    ],
)
def test_wrong_settings_are_a_warning(track, server, tmp_path, monkeypatch, variable, value, said):
    if value == "another":
        value = certificate(tmp_path, "elsewhere")[0]
    if value == "two lines":
        value = tmp_path / "lines"
        value.write_text("hunter2\nhunter2")
    monkeypatch.setenv(f"KUBEFLOW_TRAINER_SERVER_{variable}", str(value))
    train(track)
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert said in log
    assert "hunter2" not in log
    assert server.received == []


def test_the_token_is_read_again_since_it_is_replaced(track, server, tmp_path):
    (tmp_path / "token").write_text("expired")

    def renew():
        until = time.monotonic() + 20
        while not server.requests and time.monotonic() < until:
            time.sleep(0.01)
        (tmp_path / "token").write_text(TOKEN)

    train(track, before_end=renew)
    assert [status["progressPercentage"] for status in server.received] == [100]


@pytest.mark.slow
def test_a_server_that_never_answers_does_not_keep_the_run(track, server, tmp_path):
    server.answer = "hang"
    train(track, code=143)
    assert "timed out); the training goes on" in (tmp_path / "logs" / "rank-0.log").read_text()


def test_other_ranks_and_places_send_nothing(track, server, monkeypatch):
    train(track, rank=1)
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL")
    train(track)
    assert server.requests == []
