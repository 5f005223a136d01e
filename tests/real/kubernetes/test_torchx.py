"""Runs in a real cluster by TorchX: `torchx run -s kubernetes_job isorun.fit`."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from tests.real.kubernetes.kube import PLACED, SECONDS, number
from tests.real.kubernetes.runs import (
    FAULT,
    NEVER,
    SMALL,
    STEPS,
    goes_on,
    overrides,
    resumed,
    verify,
)
from tests.support.kubectl import kubectl
from tests.support.runs import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
CONFIG = SMALL[SMALL.index("--config") + 1]


@pytest.fixture(autouse=True)
def _installed():
    if "kubernetes_job" not in {p.name for p in entry_points(group="torchx.schedulers")}:
        pytest.skip("isorun's entry points for TorchX are not installed")


@pytest.fixture
def torchx(kube, tmp_path):
    """Runs a command of TorchX, or of another module; returns its output."""
    # The kubeconfig names the namespace, because `torchx list` has no option for it.
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
        "PYTHONPATH": str(ROOT),
    }

    def run(*words, code=0, module="torchx.cli.main", directory=ROOT):
        done = subprocess.run(
            [sys.executable, "-m", module, *words],
            cwd=directory, env=environment, capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert done.returncode == code, f"{module} {' '.join(words)}: {done.returncode}\n{said}"
        return said

    return run


def submit(torchx, kube, name, steps, *more, options=(), cfg="", **how):
    """Submits a run; returns the handle of the job."""
    said = torchx(
        "run", "-s", "kubernetes_job", "--workspace", "",
        # Half a core per pod: together with the cluster's own pods, two fit on two cores.
        "-cfg", f"overlay=cpu-demo,shared_memory=256Mi,cpu=500m{cfg}",
        "isorun.fit", "-j", "2x1", "--cpu", "1", "--memMB", "1536", "--image", kube.image,
        "--max_retries", "2", *options, "--config", CONFIG,
        *(word for word in overrides(name, steps, *more) if "=" in word), **how,
    )  # fmt: skip
    return re.search(r"kubernetes_job://\S+", said)[0]


def job_name(handle):
    return handle.rpartition(":")[2]


def completed(kube, handle):
    job = job_name(handle)
    kind, reason = kube.finished(job)
    assert kind == "Complete", f"{kind} ({reason})\n{kube.report(job)}"


def test_a_run_from_submission_to_its_end(kube, torchx, name):
    handle = submit(torchx, kube, name, 40)
    log = torchx("log", "--tail", handle)
    assert re.search(r"fit/[01]\S* Finished: 40 steps", log), log
    completed(kube, handle)
    assert "SUCCEEDED" in torchx("status", handle)
    listed = torchx("list", "-s", "kubernetes_job")
    assert re.search(rf"{job_name(handle)}\S*\s+SUCCEEDED", listed), listed
    verify(kube, name, 40)


HOOK = """
from train import Hook

class Say(Hook):
    def on_run_start(self, facts):
        print("said by", __file__, flush=True)
"""


@pytest.mark.parametrize("option", ["sync", "sync_volume"])
def test_the_working_tree_is_used_without_building_an_image(kube, torchx, name, tmp_path, option):
    tree = tmp_path / "tree"
    (tree / "configs").mkdir(parents=True)
    shutil.copy(ROOT / CONFIG, tree / CONFIG)
    (tree / "mine.py").write_text(HOOK)
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    handle = submit(
        torchx, kube, name, 10, "hooks=[mine:Say]", cfg=f",{option}=true", directory=tree
    )  # fmt: skip
    completed(kube, handle)
    assert "said by /isorun/code/mine.py" in torchx("log", handle)
    job = job_name(handle)
    digest = kube.pods(job)[0]["metadata"]["annotations"]["isorun/code"]
    assert digest.startswith("sha256:")
    if kube.volume:
        assert digest in (kube.volume / name / "attempts.jsonl").read_text()
        stored = kube.volume / f".code/{digest.removeprefix('sha256:')}.tar.gz"
        assert stored.exists() == (option == "sync_volume")
    maps = [each["metadata"]["name"] for each in kube.get("configmaps")]
    assert f"{job}-code-0" in maps


TRAINER = "trainjobs.trainer.kubeflow.org"


def test_a_train_job_from_submission_to_its_end(kube, cluster, torchx, name):
    """The trainer refuses a TrainJob whose runtime it has not noticed, which a submission waits
    for."""
    if cluster:
        cluster.add("jobset", "trainer")
    if TRAINER not in kube.run("get", "crd", "-o", "name", namespace=False):
        pytest.skip(f"the cluster has no {TRAINER}")
    handle = submit(torchx, kube, name, 40, cfg=",components=trainjob")
    job = job_name(handle)
    log = torchx("log", "--tail", handle)
    assert re.search(r"fit/[01]\S* Finished: 40 steps", log), log
    kube.until("the end", lambda: "SUCCEEDED" in torchx("status", handle), job)
    assert re.search(rf"{job}\S*\s+SUCCEEDED", torchx("list", "-s", "kubernetes_job"))
    verify(kube, name, 40)
    second = submit(torchx, kube, f"{name}-b", 100_000, cfg=",components=trainjob")
    job = job_name(second)
    kube.at_step(job, FAULT)
    torchx("cancel", second)
    kube.until("the end of all pods", lambda: not kube.pods(job), job)
    assert "CANCELLED" in torchx("status", second)
    kube.run("delete", "trainjob", job)
    kube.until("the end of the runtime", lambda: job not in [
        each["metadata"]["name"] for each in kube.get("trainingruntimes")
    ], job)  # fmt: skip


def test_cancel_saves_and_a_new_launch_is_the_same_run(kube, torchx, name):
    first = submit(torchx, kube, name, STEPS, NEVER)
    kube.at_step(job_name(first), FAULT)
    torchx("cancel", first)
    kube.until("the end of all pods", lambda: not kube.pods(job_name(first)), job_name(first))
    assert "CANCELLED" in torchx("status", first)
    second = submit(torchx, kube, name, STEPS, NEVER)
    assert second != first
    completed(kube, second)
    log = torchx("log", second)
    assert (resumed(log) or 0) >= FAULT, log
    verify(kube, name, STEPS, NEVER)


def test_a_pod_is_lost_during_the_run(kube, torchx, name):
    handle = submit(torchx, kube, name, STEPS)
    job = job_name(handle)
    kube.at_step(job, FAULT)
    pod = next(p for p in kube.pods(job) if number(p) == 1)["metadata"]["name"]
    kube.run("delete", "pod", pod, "--wait=false")
    completed(kube, handle)
    goes_on(kube, job)
    assert "SUCCEEDED" in torchx("status", handle)
    verify(kube, name, STEPS)


def test_a_config_error_is_reported_before_any_object_is_created(kube, torchx, name):
    said = torchx(
        "run", "-s", "kubernetes_job", "--workspace", "", "isorun.fit",
        "--config", CONFIG, f"run.name={name}", "optim.lrr=1", code=64,
    )  # fmt: skip
    assert "did you mean optim.lr?" in said, said
    made = [job["metadata"]["name"] for job in kube.get("jobs")]
    assert not [job for job in made if job.startswith(name)], made


def test_a_config_error_found_only_in_the_image_fails_the_job_at_once(
    kube, torchx, name, tmp_path
):  # fmt: skip
    """Submitted from a directory without the config file, so that it cannot be checked before."""
    handle = submit(torchx, kube, name, 40, "optim.lrr=1", options=["--check", "False"],
                    directory=tmp_path)  # fmt: skip
    job = job_name(handle)
    kind, reason = kube.finished(job, PLACED)
    assert (kind, reason) == ("Failed", "PodFailurePolicy"), kube.report(job)
    numbers = [number(pod) for pod in kube.pods(job)]
    assert len(numbers) == len(set(numbers)), f"retried\n{kube.report(job)}"
    assert "FAILED" in torchx("status", handle)
    why = torchx("why", handle, module="launch", directory=tmp_path)
    assert "FAILED, exit code 64" in why, why
    assert "optim.lrr is not a known key" in why, why
    assert "Another launch of the same run would fail again." in why, why
