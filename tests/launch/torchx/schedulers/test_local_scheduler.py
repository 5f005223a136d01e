import pytest

from launch.history.launch_log import record_end
from launch.torchx.schedulers.local_scheduler import log_directory, seconds_to_stop
from tests.launch.launched import submit
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
