"""Runs of the tests in a cluster, and what they must have done."""

import re
import time

from launch.kubernetes.scheduler import create_scheduler
from tests.real.kubernetes.kube import PLACED, number
from tests.support.controllers import COUNTED, IGNORED

# `text`, but smaller: a step takes 20 ms or more.
SMALL = [
    "--config", "configs/text.yaml", "model.layers=1", "model.width=64", "data.context=64",
    "evaluate.every_steps=1000", "task.sample_tokens=8", "checkpoint.every_steps=20", "track.log_every_steps=5",
    "track.wandb=disabled", "schedule.warmup_steps=5",
]  # fmt: skip
# For runs with a fault after step 20, which must come before their end.
STEPS = 240
FAULT = 20
# For stopped runs: they can resume only from the checkpoint of the stop.
NEVER = "checkpoint.every_steps=100000"


def overrides(name, steps, *more):
    return [*SMALL, f"run.name={name}", f"length.steps={steps}", *more]


def fit(name, steps, *more):
    return ["python", "-m", "train", "fit", *overrides(name, steps, *more)]


def verify(kube, name, steps, *more):
    log = kube.verify(name, overrides(name, steps, *more))
    assert f"checkpoint step {steps}: ok" in log, log
    assert "all well" in log, log


def completed(kube, name):
    kind, reason = kube.finished(name)
    assert kind == "Complete", f"{name} ended as {kind} ({reason})\n{kube.report(name)}"


def final_loss(kube, name):
    """As rank 0 logs it at the last step."""
    return re.findall(rf"^step {STEPS}/{STEPS}\s+loss (\S+)", kube.logs(name), re.M)[-1]


def of_node(kube, name, index):
    """The name of the newest pod of a node."""
    return [p for p in kube.pods(name) if number(p) == index][-1]["metadata"]["name"]


def goes_on(kube, job):
    """Later pods resumed the run, and the end of earlier ones did not count as a failure."""
    step = resumed(kube.logs(job))
    assert step is not None, f"no second attempt\n{kube.report(job)}"
    assert step > 0, f"started from the beginning\n{kube.report(job)}"
    pods = kube.pods(job)
    newest = {number(pod): pod["metadata"].get("annotations", {}) for pod in pods}
    assert {index: found.get(COUNTED) for index, found in newest.items()} == {0: "0", 1: "0"}, (
        kube.report(job)
    )
    assert any(int(found.get(IGNORED, 0)) > 0 for found in newest.values()), kube.report(job)
    assert not kube.job(job)["status"].get("failedIndexes"), kube.report(job)


def resumed(log):
    """The step from which a later attempt resumed."""
    found = re.search(r"resumes at step (\d+) \(attempt [2-9]", log)
    return int(found[1]) if found else None


def told(kube, name):
    """(state, message) of `torchx status`."""
    found = create_scheduler("test").describe(f"{kube.namespace}:{name}")
    return found.state.name, found.msg


def until_told(kube, name, text):
    """Waits until `torchx status` says a text."""
    deadline = time.monotonic() + PLACED
    while text not in told(kube, name)[1]:
        assert time.monotonic() < deadline, f"{told(kube, name)}\n{kube.report(name)}"
        time.sleep(1)
    return told(kube, name)[1]
