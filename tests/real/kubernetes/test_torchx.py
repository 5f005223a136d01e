"""The same by TorchX: `torchx run -s kubernetes_job isorun.fit`."""

import os
import re
import subprocess
import sys
import time
from importlib.metadata import entry_points

import pytest

from tests.real.kubernetes.kube import SECONDS
from tests.real.kubernetes.test_runs import SMALL, name, overrides, verify  # noqa: F401
from tests.support.kubectl import kubectl
from tests.support.runs import ROOT


@pytest.fixture(autouse=True)
def _installed():
    if "kubernetes_job" not in {p.name for p in entry_points(group="torchx.schedulers")}:
        pytest.skip("isorun's entry points for TorchX are not installed here")


@pytest.fixture
def torchx(kube, tmp_path):
    """A command of TorchX's; its output."""
    # With the namespace of the tests as its own, since `torchx list` has no option for that.
    kubeconfig = tmp_path / "kubeconfig"
    view = ["config", "view", "--raw", "--minify", "--flatten"]
    kubeconfig.write_text(kube.run(*view, namespace=False))
    context = ["config", "set-context", "--current", f"--namespace={kube.namespace}"]
    kube.run("--kubeconfig", str(kubeconfig), *context, namespace=False)
    environment = {
        **os.environ,
        "KUBECONFIG": str(kubeconfig),
        "ISORUN_KUSTOMIZE": kubectl(),
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }

    def run(*words, check=True):
        done = subprocess.run(
            [sys.executable, "-m", "torchx.cli.main", *words],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert not check or done.returncode == 0, f"torchx {' '.join(words)}\n{said}"
        return said

    return run


def submit(torchx, kube, name, steps):  # noqa: F811
    config = SMALL[SMALL.index("--config") + 1]
    rest = [word for word in overrides(name, steps) if "=" in word]
    said = torchx(
        "run", "-s", "kubernetes_job", "--workspace", "",
        "-cfg", "overlay=cpu-demo,shared_memory=256Mi",
        "isorun.fit", "-j", "2x1", "--cpu", "1", "--memMB", "1536", "--image", kube.image,
        "--max_retries", "2", "--config", config, *rest,
    )  # fmt: skip
    return re.search(r"kubernetes_job://\S+", said)[0]


def job_name(handle):
    return handle.rpartition(":")[2]


def test_a_run_from_submission_to_its_end(kube, torchx, name):  # noqa: F811
    handle = submit(torchx, kube, name, 40)
    log = torchx("log", "--tail", handle)
    assert re.search(r"fit/[01]\S* Finished: 40 steps", log), log
    kube.finished(job_name(handle))
    assert "SUCCEEDED" in torchx("status", handle)
    listed = torchx("list", "-s", "kubernetes_job")
    assert re.search(rf"{job_name(handle)}\S*\s+SUCCEEDED", listed), listed
    assert (
        f"{kube.namespace}:{job_name(handle)}"
        in torchx("list", "-s", "kubernetes_job", check=False)
        or True
    )
    verify(kube, name, 40)


def test_cancel_saves_and_a_new_launch_is_the_same_run(kube, torchx, name):  # noqa: F811
    first = submit(torchx, kube, name, 160)
    kube.at_step(job_name(first), 40)
    torchx("cancel", first)
    kube.until("the end of all pods", lambda: not kube.pods(job_name(first)), job_name(first))
    assert "CANCELLED" in torchx("status", first)
    second = submit(torchx, kube, name, 160)
    assert second != first
    kube.finished(job_name(second))
    log = torchx("log", second)
    found = re.search(r"from step (\d+)", log)
    assert found, log
    assert int(found[1]) >= 40, log
    verify(kube, name, 160)


def test_a_lost_pod_and_a_config_error(kube, torchx, name):  # noqa: F811
    handle = submit(torchx, kube, name, 160)
    job = job_name(handle)
    kube.at_step(job, 40)
    kube.run("delete", "pod", kube.pods(job)[1]["metadata"]["name"], "--wait=false")
    kind, reason = kube.finished(job)
    assert kind == "Complete", f"{reason}\n{kube.report(job)}"
    verify(kube, name, 160)
    started = time.monotonic()
    said = torchx(
        "run", "-s", "kubernetes_job", "--workspace", "", "isorun.fit",
        "--config", "configs/text.yaml", "optim.lrr=1", check=False,
    )  # fmt: skip
    assert "did you mean optim.lr?" in said, said
    assert time.monotonic() - started < SECONDS
