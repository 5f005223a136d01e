import pytest

from launch.history import launch_log
from launch.history.launch_log import record_end
from launch.torchx.schedulers.local_scheduler import log_directory, seconds_to_stop
from tests.launch.launched import submit
from tests.launch.launching import dryrun
from tests.support.runs import TINY
from train.exits import UsageError


def test_an_agent_gets_its_own_timeout_and_a_margin_to_stop():
    assert seconds_to_stop({}) == 45
    assert seconds_to_stop({"PET_SHUTDOWN_TIMEOUT": "100"}) == 110
    assert seconds_to_stop({"PET_SHUTDOWN_TIMEOUT": "soon"}) == 45


def test_the_log_of_a_job_of_another_command_is_found_by_the_launch_log(tmp_path):
    submit("1", "local_cwd", log_directory=str(tmp_path), pid=2**22 + 1)
    with pytest.raises(UsageError, match=f"LOST: .* left its log in {tmp_path}"):
        log_directory("1")
    handle, _ = submit("2", "local_cwd", log_directory=str(tmp_path))
    record_end(handle, "SUCCEEDED", [0])
    assert log_directory("2") == tmp_path


@pytest.mark.parametrize(
    ("recorded", "message"),
    [("/nonexistent", "removed its log"), (None, "did not record where its log is")],
)
def test_a_log_that_is_gone_is_reported(recorded, message):
    submit("1", "local_cwd", log_directory=recorded)
    with pytest.raises(UsageError, match=message):
        log_directory("1")


def test_an_unknown_job_is_reported():
    with pytest.raises(UsageError, match="local_cwd has no job 'x'"):
        log_directory("x")


@pytest.mark.parametrize("scheduler", ["local_cwd", "local_docker"])
def test_nodes_that_start_together_get_a_secret_that_is_not_recorded(scheduler, monkeypatch):
    for name in ("ISORUN_SECRET", "ISORUN_SECRET_FILE"):
        monkeypatch.delenv(name, raising=False)

    def secret_of(nodes):
        info = dryrun("isorun.fit", "-j", f"{nodes}x1", *TINY, scheduler=scheduler)
        [role] = (getattr(info, "app", None) or info._app).roles
        return role.env.get("ISORUN_SECRET"), info

    assert secret_of(1)[0] is None, "the agent makes one"
    (first, info), (second, _) = secret_of(2), secret_of(2)
    assert len(first) == 64
    assert first != second
    app = getattr(info, "app", None) or info._app
    assert first in str(info)
    launch_log.record_start(f"{scheduler}://torchx/1", scheduler, app, str(info))
    assert first not in launch_log.path().read_text()
