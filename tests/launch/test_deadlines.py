"""The times of a stop follow one rule; templates and batch file have the same numbers."""

import re

import pytest
import yaml

from launch import deadlines
from launch.agent.options import parse
from launch.kubernetes.checks import check
from launch.torchx.schedulers.local_scheduler import seconds_to_stop
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


def test_a_pod_must_outlive_the_reports_of_the_agent():
    check([pod(120, PET_SHUTDOWN_TIMEOUT="114")])
    with pytest.raises(UsageError, match="kills them after 115 s .* needs 5 s to report"):
        check([pod(120, PET_SHUTDOWN_TIMEOUT="115")])


def test_the_template_of_a_pod_has_the_margins():
    ranks, agent, grace = of_the_pod()
    assert agent == ranks + deadlines.POD_AGENT_AFTER_RANKS
    assert grace == agent + deadlines.POD_AFTER_AGENT


def of_this_machine():
    options = parse(["--", "true"], {})
    return options.stop_deadline, options.shutdown_timeout, seconds_to_stop({})


def of_a_short_timeout():
    options = parse(["--shutdown-timeout", "2", "--", "true"], {})
    environ = {"PET_SHUTDOWN_TIMEOUT": "2"}
    return options.stop_deadline, options.shutdown_timeout, seconds_to_stop(environ)


def of_compose():
    ranks, agent, _ = of_this_machine()
    node = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]["node1"]
    assert "PET_SHUTDOWN_TIMEOUT" not in node["environment"]
    return ranks, agent, float(node["stop_grace_period"].removesuffix("s"))


def of_the_pod():
    job = yaml.safe_load((ROOT / "k8s/base/job.yaml").read_text())
    spec = job["spec"]["template"]["spec"]
    env = {item["name"]: item.get("value") for item in spec["containers"][0]["env"]}
    ranks, agent = int(env["ISORUN_STOP_DEADLINE"]), int(env["PET_SHUTDOWN_TIMEOUT"])
    return ranks, agent, spec["terminationGracePeriodSeconds"]


def of_the_batch_file():
    text = (ROOT / "configs/slurm/fit.sbatch").read_text()
    agent = int(re.search(r"--shutdown-timeout (\d+)", text)[1])
    ranks = deadlines.stop_deadline(agent)
    assert f"{ranks:g} s" in text
    return ranks, agent, int(re.search(r"--signal=TERM@(\d+)", text)[1])


def of_a_scheduler_with_30_seconds():
    """As the documentation recommends for it."""
    options = parse(["--", "true"], {"PET_SHUTDOWN_TIMEOUT": "20"})
    return options.stop_deadline, options.shutdown_timeout, 30


@pytest.mark.parametrize(
    "launcher",
    [
        of_this_machine,
        of_a_short_timeout,
        of_compose,
        of_the_pod,
        of_the_batch_file,
        of_a_scheduler_with_30_seconds,
    ],
)
def test_the_times_of_a_launcher_add_up(launcher):
    ranks, agent, grace = launcher()
    assert deadlines.adds_up(ranks, agent, grace)
    asked = 1000.0
    for silent_since in (asked, asked + agent / 2, asked + agent):
        due = deadlines.reports_due(silent_since, 25.0, asked, agent)
        assert silent_since < due < asked + grace


def test_a_silent_node_is_lost_after_the_usual_time_if_there_is_more():
    assert deadlines.reports_due(7.0, 25.0, None, 35.0) == 32.0
    assert deadlines.reports_due(7.0, 25.0, 6.0, 105.0) == 32.0
    assert deadlines.reports_due(7.0, 25.0, 6.0, 2.0) == 13.0
