"""The times of a stop follow one rule; templates and batch file have the same numbers."""

import re

import pytest
import yaml

from launch import deadlines
from launch.agent.options import parse
from launch.kubernetes.checks import check
from tests.support.runs import ROOT
from train.exits import UsageError


def pod(grace, *options, **env):
    """A pod that runs the agent."""
    container = {
        "image": f"isorun@sha256:{'0' * 64}",
        "command": ["python", "-m", "launch.agent", *options, "--"],
        "args": ["python", "-m", "train", "fit"],
        "env": [{"name": name, "value": value} for name, value in env.items()],
    }
    spec = {"terminationGracePeriodSeconds": grace, "containers": [container]}
    return {"kind": "Pod", "metadata": {"name": "run"}, "spec": spec}


@pytest.mark.parametrize("timeout", ["60", "8", "1"])
def test_the_agent_and_the_checks_of_a_pod_use_the_same_deadline(timeout):
    options = parse(["--shutdown-timeout", timeout, "--", "true"], {})
    assert 0 < options.stop_deadline < options.shutdown_timeout
    check([pod(120, PET_SHUTDOWN_TIMEOUT=timeout)], options.stop_deadline)
    with pytest.raises(UsageError, match="has stop.deadline="):
        check([pod(120, PET_SHUTDOWN_TIMEOUT=timeout)], options.stop_deadline + 0.1)


def test_an_option_of_the_agent_takes_precedence_over_its_variable():
    check([pod(120, "--shutdown-timeout=110", PET_SHUTDOWN_TIMEOUT="200")])
    with pytest.raises(UsageError, match="kills them after 200 s"):
        check([pod(120, "--shutdown-timeout", "200", PET_SHUTDOWN_TIMEOUT="110")])


def test_a_timeout_that_is_not_a_number_is_a_usage_error():
    with pytest.raises(UsageError, match="'soon' .environment variable PET_SHUTDOWN_TIMEOUT."):
        check([pod(120, PET_SHUTDOWN_TIMEOUT="soon")])


def test_the_template_of_a_pod_has_the_margins():
    job = yaml.safe_load((ROOT / "k8s/base/job.yaml").read_text())
    spec = job["spec"]["template"]["spec"]
    env = {item["name"]: item.get("value") for item in spec["containers"][0]["env"]}
    ranks, agent = int(env["ISORUN_STOP_DEADLINE"]), int(env["PET_SHUTDOWN_TIMEOUT"])
    assert agent == ranks + deadlines.POD_AGENT_AFTER_RANKS
    assert spec["terminationGracePeriodSeconds"] == agent + deadlines.POD_AFTER_AGENT


def test_the_batch_file_has_the_margins():
    text = (ROOT / "configs/slurm/fit.sbatch").read_text()
    agent = int(re.search(r"--shutdown-timeout (\d+)", text)[1])
    assert int(re.search(r"--signal=TERM@(\d+)", text)[1]) > agent
    assert f"{deadlines.stop_deadline(agent):g} s" in text
