"""Runs in a real cluster by TorchX: `torchx run -s kubernetes_job isorun.fit`."""

import re
import shutil
import subprocess
from importlib.metadata import entry_points

import pytest

from tests.real.kubernetes.kube import PLACED, launched, number
from tests.real.kubernetes.local import HOST
from tests.real.kubernetes.runs import (
    FAULT,
    NEVER,
    SMALL,
    STEPS,
    overrides,
    resumed,
    verify,
)
from tests.support.kubectl import kubectl
from tests.support.object_store import KEYS, s3_server
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
    own = {
        "KUBECONFIG": str(kubeconfig),
        "ISORUN_KUSTOMIZE": kubectl(),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "PYTHONPATH": str(ROOT),
    }

    def run(*words, code=0, module="torchx.cli.main", directory=ROOT):
        ended, *said = launched(*words, module=module, cwd=directory, env=own)
        assert ended == code, f"{module} {' '.join(words)}: {ended}\n{''.join(said)}"
        return "".join(said)

    return run


def submit(torchx, kube, name, steps, *more, options=(), cfg="", j="2x1", **how):
    """Submits a run; returns the handle of the job."""
    # Half a core per pod: together with a cluster's own pods, two fit on two cores.
    cpu = "1" if kube.local else "500m"
    said = torchx(
        "run", "-s", "kubernetes_job", "--workspace", "",
        "-cfg", f"overlay=cpu-demo,shared_memory=256Mi,cpu={cpu}{cfg}",
        "isorun.fit", "-j", j, "--cpu", "1", "--memMB", "1536", "--image", kube.image,
        "--max_retries", "2", *options, "--preflight", "off", "--config", CONFIG,
        *(word for word in overrides(name, steps, *more) if "=" in word), **how,
    )  # fmt: skip
    return re.search(r"kubernetes_job://\S+", said)[0]


def job_name(handle):
    return handle.rpartition(":")[2]


def is_active(pod):
    return pod["status"]["phase"] in ("Pending", "Running")


def completed(kube, handle):
    job = job_name(handle)
    kind, reason = kube.finished(job)
    assert kind == "Complete", f"{kind} ({reason})\n{kube.report(job)}"


HOOK = """
from train import Hook

class Say(Hook):
    def on_run_start(self, facts):
        print("said by", __file__, flush=True)
"""


@pytest.fixture
def tree(tmp_path):
    """A working tree with a hook of its own."""
    tree = tmp_path / "tree"
    (tree / "configs").mkdir(parents=True)
    shutil.copy(ROOT / CONFIG, tree / CONFIG)
    (tree / "mine.py").write_text(HOOK)
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    return tree


def used(kube, torchx, handle, name):
    """The key of the archive with the working tree's code, which the run has used."""
    assert "said by /isorun/code/mine.py" in torchx("log", handle)
    job = job_name(handle)
    digest = kube.pods(job)[0]["metadata"]["annotations"]["isorun/code"]
    assert digest.startswith("sha256:")
    if kube.volume:
        assert digest in (kube.volume / name / "attempts.jsonl").read_text()
    maps = [each["metadata"]["name"] for each in kube.get("configmaps")]
    assert f"{job}-code-0" in maps
    return f".code/{digest.removeprefix('sha256:')}.tar.gz"


def test_a_run_of_the_working_tree_from_submission_to_its_end(kube, torchx, name, tree):
    """Without building an image."""
    handle = submit(torchx, kube, name, 40, "hooks=[mine:Say]", cfg=",sync=true", directory=tree)
    log = torchx("log", "--tail", handle)
    assert re.search(r"fit/[01]\S* Finished: 40 steps", log), log
    completed(kube, handle)
    assert "SUCCEEDED" in torchx("status", handle)
    listed = torchx("list", "-s", "kubernetes_job")
    assert re.search(rf"{job_name(handle)}\S*\s+SUCCEEDED", listed), listed
    key = used(kube, torchx, handle, name)
    if kube.volume:
        assert not (kube.volume / key).exists()
    verify(kube, name, 40)


def test_the_working_tree_on_the_volume(kube, torchx, name, tree):
    handle = submit(
        torchx, kube, name, 10, "hooks=[mine:Say]", cfg=",sync_volume=true", j="1x1",
        directory=tree,
    )  # fmt: skip
    completed(kube, handle)
    key = used(kube, torchx, handle, name)
    assert not kube.volume or (kube.volume / key).exists()


def test_the_working_tree_in_an_object_store(kube, cluster, torchx, name, tree, tmp_path):
    if cluster is None:
        pytest.skip("only the nodes of a cluster on this machine reach a server of the tests")
    keys = ("aws_access_key_id", "aws_secret_access_key")
    lines = ["[default]", *(f"{key} = {KEYS[key.upper()]}" for key in keys)]
    (tmp_path / "credentials").write_text("\n".join(lines))
    given = f"--from-file={tmp_path / 'credentials'}"
    kube.run("create", "secret", "generic", "object-store", given)
    try:
        with s3_server(HOST) as (url, endpoint), pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", endpoint)
            handle = submit(
                torchx, kube, name, 10, "hooks=[mine:Say]", directory=tree, j="1x1",
                cfg=f",components=object-store,sync_store={url}",
                options=["--env", f"AWS_ENDPOINT_URL={endpoint}"],
            )  # fmt: skip
            completed(kube, handle)
            key = used(kube, torchx, handle, name)
            import s3fs

            assert s3fs.S3FileSystem().exists(f"{url}/{key}")
    finally:
        kube.run("delete", "secret", "object-store")


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
    second = submit(torchx, kube, f"{name}-b", 100_000, cfg=",components=trainjob", j="1x1")
    job = job_name(second)
    kube.at_step(job, 1)
    torchx("cancel", second)
    kube.until("the end of all pods", lambda: not kube.pods(job), job)
    assert "CANCELLED" in torchx("status", second)
    kube.run("delete", "trainjob", job)
    kube.until("the end of the runtime", lambda: job not in [
        each["metadata"]["name"] for each in kube.get("trainingruntimes")
    ], job)  # fmt: skip


def test_after_cancel_a_new_launch_is_the_same_run(kube, torchx, name):
    first = submit(torchx, kube, name, STEPS, NEVER)
    job = job_name(first)
    kube.at_step(job, FAULT)
    torchx("cancel", first)
    kube.until("the end of all pods", lambda: not any(map(is_active, kube.pods(job))), job)
    assert "CANCELLED" in torchx("status", first)
    second = submit(torchx, kube, name, STEPS, NEVER)
    assert second != first
    completed(kube, second)
    log = torchx("log", second)
    assert (resumed(log) or 0) >= FAULT, log
    assert "SUCCEEDED" in torchx("status", second)
    verify(kube, name, STEPS, NEVER)


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
    pods = kube.pods(job)
    numbers = [number(pod) for pod in pods]
    assert len(numbers) == len(set(numbers)), f"retried\n{kube.report(job)}"
    ended = [
        s["state"].get("terminated", {}) for p in pods for s in p["status"]["containerStatuses"]
    ]
    assert any("optim.lrr is not a known key" in each.get("message", "") for each in ended), ended
    assert "FAILED" in torchx("status", handle)
    why = torchx("why", handle, module="launch", directory=tmp_path)
    assert "FAILED, exit code 64" in why, why
    assert "optim.lrr is not a known key" in why, why
    assert "Another launch of the same run would fail again." in why, why
