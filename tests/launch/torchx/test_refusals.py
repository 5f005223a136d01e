"""What a backend refuses is one sentence with its reason, what to change, and 64 or 75."""

import json
import subprocess

import docker.errors
import pytest
import requests.exceptions
import urllib3.exceptions
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError
from kubernetes.client.rest import ApiException
from kubernetes.config import ConfigException
from torchx.specs.api import MalformedAppHandleException, parse_app_handle

from launch.torchx.refusals import command_refusal, refusal_of, refusals
from train.exits import Exit, RetryError, UsageError


class _Response:
    def __init__(self, status):
        self.status_code, self.url, self.reason = status, "http://engine", "no"


def _engine(status, explanation, kind=docker.errors.APIError):
    return kind("request failed", response=_Response(status), explanation=explanation)


def _no_engine(cause):
    """As docker-py raises it: the cause is an argument of an argument."""
    aborted = urllib3.exceptions.ProtocolError("Connection aborted.", cause)
    made = docker.errors.DockerException("Error while fetching server API version")
    made.__cause__ = requests.exceptions.ConnectionError(aborted)
    return made


def _server(status, message):
    made = ApiException(status=status, reason="Reason")
    made.body = json.dumps({"message": message})
    return made


def _cloud(code, status):
    answer = {
        "Error": {"Code": code, "Message": "the reason"},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return ClientError(answer, "SubmitJob")


CASES = [
    (_no_engine(FileNotFoundError(2, "No such file or directory")), 75, "does not answer .No such file"),
    (_no_engine(ConnectionRefusedError(111, "Connection refused")), 75, "does not answer .Connection re"),
    (_no_engine(PermissionError(13, "Permission denied")), 64, "may not use the Docker engine; add the"),
    (docker.errors.DockerException("Invalid bind protocol: htp://"), 64, "Invalid bind .*; correct DOCKER_HOST"),
    (_engine(404, "No such image: x:1", docker.errors.ImageNotFound), 64, "No such image: x:1; build"),
    (_engine(400, 'invalid mount config for type "bind": bind source path does not exist: /a'), 64, "/a; create the"),
    (_engine(500, 'could not select device driver "" with capabilities: [[gpu]]'), 64, "NVIDIA"),
    (_engine(409, "name in use"), 64, "name in use; correct"),
    (_engine(500, "disk full"), 75, "disk full; retry later"),
    (_server(403, "pods is forbidden."), 64, "pods is forbidden; ask for this permission"),
    (_server(422, "spec is invalid"), 64, "spec is invalid; correct the object"),
    (_server(503, "etcd is down"), 75, "etcd is down; retry later"),
    (ConfigException("no file"), 64, "no cluster is configured .no file"),
    (urllib3.exceptions.MaxRetryError(None, "/apis", OSError("unreachable")), 75, "unreachable; check the network"),
    (_cloud("ClientException", 400), 64, "the reason .ClientException.; correct"),
    (_cloud("ThrottlingException", 400), 75, "retry later"),
    (_cloud("ServerException", 500), 75, "retry later"),
    (NoCredentialsError(), 64, "Unable to locate credentials; correct"),
    (EndpointConnectionError(endpoint_url="http://aws"), 75, "check the network"),
    (FileNotFoundError(2, "No such file or directory", "bsub"), 64, "bsub is not installed"),
    (PermissionError(13, "Permission denied", "/jobs"), 64, "Permission denied: /jobs; correct the path"),
    (OSError(28, "No space left on device"), 75, "No space left on device; fix the cause"),
    (ModuleNotFoundError("No module named 'gcp'", name="gcp"), 64, "package 'gcp' is not installed"),
    (subprocess.CalledProcessError(1, ["scancel", "1"], stderr="scancel: error: Invalid job id"), 64, "Invalid job id"),
    (subprocess.CalledProcessError(1, "bkill 1"), 64, "bkill ended with exit code 1; see its message"),
    (MalformedAppHandleException("x"), 64, "x is not of the form"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "code", "said"), CASES)
def test_each_refusal_has_its_reason_what_to_do_and_a_code(error, code, said):
    with (
        pytest.raises(
            (UsageError, RetryError), match=f"^Cannot submit the job: .*{said}"
        ) as caught,
        refusals("submit the job"),
    ):
        raise error
    assert caught.value.code == code
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "error", [TypeError("x is None"), KeyError("role"), BrokenPipeError(32, "pipe")]
)
def test_a_bug_and_a_closed_output_are_not_refusals(error):
    assert refusal_of(error, "submit") is None
    with pytest.raises(type(error)), refusals("submit"):
        raise error


def test_an_error_of_isorun_stays_the_same():
    error = UsageError("as it is")
    with pytest.raises(UsageError) as caught, refusals("submit"):
        raise error
    assert caught.value is error


def test_a_refusal_of_torchx_in_a_builtin_exception_is_one():
    with pytest.raises(UsageError, match="is not of the form"), refusals("read the state"):
        parse_app_handle("nothing")


@pytest.mark.parametrize(
    ("stderr", "code", "said"),
    [
        ("sbatch: error: Batch job submission failed: Invalid partition name specified\n", 64,
         "sbatch says: Batch job submission failed: Invalid partition name specified; correct -j"),
        ("sbatch: error: Memory specification can not be satisfied\nsbatch: error: Batch job "
         "submission failed: Requested node configuration is not available\n", 64,
         "Memory specification can not be satisfied, Batch job submission"),
        ("sbatch: fatal: Could not establish a configuration source", 64, "says: Could not establish"),
        ("sbatch: error: Unable to contact slurm controller (connect failure)", 75, "retry later"),
        ("sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying", 75, "retry"),
        ("", 75, "sbatch failed without a message; retry later"),
    ],
)  # fmt: skip
def test_a_command_s_own_message_is_the_reason(stderr, code, said):
    error = command_refusal("sbatch", stderr, "correct -j").error("submit the job")
    assert error.code == Exit(code)
    assert said in str(error)
