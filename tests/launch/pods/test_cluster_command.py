"""`isorun cluster`, and commands that read runs on a cluster."""

import io
import json
import socket
import subprocess
import tarfile
from pathlib import Path

import pytest

from launch.cli import main
from launch.kubernetes import helper_pod
from launch.kubernetes.containers import Container
from launch.pods import copies, reader
from launch.pods.find import find_run
from tests.support.cluster import Refused
from tests.test_former_version import DATA
from train.exits import RetryError

pytestmark = pytest.mark.process


def isorun(capfd, *words, expect=0):
    assert main(list(words)) == expect, capfd.readouterr()
    out, err = capfd.readouterr()
    return out if expect == 0 else err


def calls(tmp_path):
    return (tmp_path / "calls").read_text().splitlines()


def test_status_tells_state_pods_last_step_and_the_state_of_the_run(run, cluster, capfd):
    cluster.say(cluster.pod(1), "step 10/60  loss 3.1", "step 20/60  loss 2.9", "done")
    name = run.partition(":")[2]
    said = isorun(capfd, "cluster", "status", run).splitlines()
    assert said[0] == f"{name} in the namespace ml: RUNNING, a Job"
    assert said[1].startswith("  Step 20 of 60, logged ")
    pods = [p["metadata"]["name"] for p in cluster.pods()]
    assert said[2:4] == [f"  node {k}: {pod} on node-{k}, Running" for k, pod in enumerate(pods)]
    assert said[4].startswith("  run: mine-id, dead, step 3 of ")
    assert "last sign of life" in said[4]


def test_status_without_access_to_the_files_tells_the_rest(run, tmp_path, capfd):
    forbidden = 'pods "x" is forbidden: User "me" cannot create resource "pods/exec"'
    (tmp_path / "fails").write_text(f"Error from server (Forbidden): {forbidden}\n")
    said = isorun(capfd, "cluster", "status", run)
    assert "RUNNING, a Job" in said
    assert "run: its files cannot be read: The cluster refused access to the pod" in said
    assert "ask for the right to create pods/exec" in said


@pytest.mark.parametrize("word", ["run", "kubernetes_job://torchx/{run}", "{name}"])
def test_a_run_is_found_by_each_of_its_names(run, word):
    name = run.partition(":")[2]
    found = find_run(run if word == "run" else word.format(run=run, name=name))
    assert (found.cluster.namespace, found.name) == ("ml", name)


def test_a_run_is_found_by_the_id_of_its_launch(run, tmp_path):
    line = {
        "event": "submitted", "handle": f"kubernetes_job://torchx/{run}", "run_id": "my-run-1",
        "name": "my-run", "scheduler": "kubernetes_job",
    }  # fmt: skip
    log = tmp_path / "state/isorun/launches.jsonl"
    log.parent.mkdir(parents=True)
    whole = json.loads((DATA / "launches.jsonl").read_text().splitlines()[0])
    log.write_text(json.dumps({**whole, **line}) + "\n")
    assert find_run("my-run-1").name == find_run("my-run").name == run.partition(":")[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["status", "ml:none"], "There is no Job, JobSet or TrainJob none in the namespace ml"),
        (["status", "kubernetes_job://ml/x"], "is not the handle of a job; it has the form"),
        (["status", "slurm://torchx/12"], "'slurm://torchx/12' is not a run on Kubernetes"),
        (["status", "ml:x", "-n", "other"], "ml:x is in the namespace ml, but --namespace is ot"),
        (["cp", "RUN", ".", "none/x"], "The directory none does not exist; make it"),
        (["cp", "RUN", "pod"], "pod exists; name one that does not exist yet"),
        (["cp", "RUN", "../../bin/kubectl", "x"], "../../bin/kubectl is not in the run directory"),
        (["cp", "RUN", "none.txt", "x"], "mine has no none.txt."),
        (["cp", "RUN", "x", "--run-dir", "none"], "The run directory none does not exist in the"),
        (["shell", "RUN", "--node", "7"], "has no running pod of node 7; its pods are text-"),
        (["cp", "RUN", "x", "--", "ls"], "cluster cp` takes no command"),
        (["port-forward", "RUN", "0:80"], "'0' is not a port"),
    ],
)
def test_wrong_words_are_one_sentence(run, words, said, capfd):
    words = [run if word == "RUN" else word for word in words]
    code = 75 if "--run-dir" in words else 64
    error = isorun(capfd, "cluster", *words, expect=code)
    assert len(error.splitlines()) == 1
    assert said in error


def test_a_run_directory_is_copied_whole_or_without_checkpoints(run, tmp_path, capfd):
    source = tmp_path / "pod/runs/mine"
    (source / ".finished.json.new").write_text("half")
    (source / "checkpoints/.writing-000000000020-ab").mkdir()
    (source / "checkpoints/.writing-000000000020-ab/data").write_text("half")
    (source / "checkpoints/step-000000000010/.metadata").write_text("of the checkpoint")
    (source / "link").symlink_to("/etc/passwd")
    (tmp_path / "all").mkdir()
    isorun(capfd, "cluster", "cp", run, "all")
    isorun(capfd, "cluster", "cp", run, "part", "--without-checkpoints")

    def files(top):
        return {str(p.relative_to(top)): p.read_bytes() for p in top.rglob("*") if p.is_file()}

    expected = files(source)
    assert "checkpoints/step-000000000010/.metadata" in expected
    expected = {name: data for name, data in expected.items() if "/.w" not in name}
    del expected[".finished.json.new"], expected["link"]
    assert files(tmp_path / "all") == expected
    part = {name: data for name, data in expected.items() if not name.startswith("checkpoints/")}
    assert files(tmp_path / "part") == part != expected


@pytest.mark.slow
def test_a_file_is_copied_to_a_name_or_into_a_directory(run, tmp_path, capfd):
    (tmp_path / "kept").mkdir()
    for to, made in (("a.json", "a.json"), ("kept", "kept/config.json")):
        isorun(capfd, "cluster", "cp", run, "config.json", to)
        assert json.loads((tmp_path / made).read_text())["run"]["name"] == "mine"
    isorun(capfd, "cluster", "cp", run, "checkpoints", "kept")
    isorun(capfd, "cluster", "cp", run, "checkpoints/step-000000000010", "kept/ten")
    names = sorted(str(p.relative_to(tmp_path)) for p in (tmp_path / "kept").rglob("manifest.json"))
    assert names == [f"kept/{d}/manifest.json" for d in ("checkpoints/step-000000000010", "ten")]
    error = isorun(capfd, "cluster", "cp", run, "checkpoints", "kept", expect=64)
    assert "kept/checkpoints exists; name one that does not exist yet" in error


def test_commands_that_read_runs_take_handles(run, capfd):
    handle = f"kubernetes_job://torchx/{run}"
    (listed,) = json.loads(isorun(capfd, "runs", "--json", handle))
    assert (listed["id"], listed["step"]) == ("mine-id", 3)
    assert not Path(listed["path"]).exists(), "the copy is temporary"
    for words, said in (
        (["fit", handle], "`fit` does not read runs on a cluster; copy the run first"),
        (["report", handle, "--watch"], "--watch does not follow a run on a cluster"),
    ):
        assert said in isorun(capfd, *words, expect=64)


def test_the_files_of_a_run_that_has_ended_are_read_by_a_pod_of_their_own(
    run, cluster, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(helper_pod, "_POLL", 0.01)
    for pod in cluster.pods():
        cluster.end(pod)
    made = []
    create = cluster.create
    monkeypatch.setattr(
        cluster, "create", lambda *words: made.append(words[2]) or create(*words)
    )  # fmt: skip
    monkeypatch.setattr(cluster, "_made", lambda plural, pod: cluster.start(pod))
    isorun(capfd, "cluster", "cp", run, "all")
    assert (tmp_path / "all/config.json").exists()
    (pod,) = made
    name, spec = pod["metadata"]["name"], pod["spec"]
    assert f"exec {name} --container train" in calls(tmp_path)[-1]
    assert name not in [p["metadata"]["name"] for p in cluster.pods()], "deleted"
    owner = pod["metadata"]["ownerReferences"][0]
    assert (owner["kind"], owner["name"]) == ("Job", run.partition(":")[2])
    # Nothing that a controller, a service or a network policy of the run would take for its own.
    assert pod["metadata"]["labels"] == {"app.kubernetes.io/name": "isorun-reader"}
    assert spec["containers"][0]["command"][0] == "sleep"
    assert "args" not in spec["containers"][0]
    assert spec["containers"][0]["resources"]["limits"]["cpu"] == "250m"
    assert {"hostname", "subdomain", "topologySpreadConstraints"}.isdisjoint(spec)
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["activeDeadlineSeconds"] == 3600


def test_a_reading_pod_that_does_not_start_says_why(run, cluster, capfd, monkeypatch):
    monkeypatch.setattr(helper_pod, "_POLL", 0.01)
    monkeypatch.setattr(reader, "_START_SECONDS", 0.1)
    for pod in cluster.pods():
        cluster.end(pod)
    unplaced = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/2 nodes",
    }

    def pending(_, pod):
        pod["status"] = {"phase": "Pending", "conditions": [unplaced]}
        cluster.logs[pod["metadata"]["uid"]] = []

    monkeypatch.setattr(cluster, "_made", pending)
    said = isorun(capfd, "cluster", "cp", run, "all", expect=75)
    assert said.count(" waits: Unschedulable: 0/2 nodes") == 1, "told at once, and once"
    assert "did not start within 0.1 s: Unschedulable: 0/2 nodes." in said
    assert not [p for p in cluster.pods() if "reader" in p["metadata"]["name"]]
    cluster.refuse["POST", "pods"] = Refused(403, "Forbidden", "pods is forbidden")
    assert "refused to create the Pod" in isorun(capfd, "cluster", "cp", run, "all", expect=64)


@pytest.mark.parametrize(
    ("stderr", "code", "said"),
    [
        ("python: No module named launch.pods", 64, "has an older isorun"),
        ("error: unable to upgrade connection: EOF", 75, "could not be reached: unable to upg"),
        ("", 75, "The files arrived incomplete"),
    ],
)
def test_a_failed_exec_is_one_sentence(run, tmp_path, capfd, stderr, code, said):
    (tmp_path / "fails").write_text(stderr)
    error = isorun(capfd, "cluster", "cp", run, "all", expect=code)
    assert said in error
    assert not (tmp_path / "all").exists()


def test_a_pod_that_does_not_answer_is_not_waited_for(run, tmp_path, monkeypatch):
    def never(words, timeout, **_):
        raise subprocess.TimeoutExpired(words, timeout)

    monkeypatch.setattr(subprocess, "run", never)
    with pytest.raises(RetryError, match="text-0 did not answer within 3 s"):
        Container("ml", "text-0", "train").output(["true"], 3)


def test_a_shell_replaces_this_process(run, cluster, tmp_path, capfd, monkeypatch):
    class Replaced(Exception):
        pass

    def replace(program, words):
        raise Replaced(words[1:])

    monkeypatch.setattr("os.execv", replace)
    pods = [p["metadata"]["name"] for p in cluster.pods()]
    for words, expected in (
        (["shell", run], ["exec", "-it", pods[0], "--container", "train", "--", "bash"]),
        (
            ["shell", run, "--node", "1", "--", "ls", "-l", "--", "x"],
            ["exec", "-i", pods[1], "--container", "train", "--", "ls", "-l", "--", "x"],
        ),
        (["port-forward", run, "8080:80"], ["port-forward", f"pod/{pods[0]}", "8080:80"]),
    ):
        assert main(["cluster", *words]) == 70  # as the exception here is not expected
        assert str(Replaced(["--namespace", "ml", *expected])) in capfd.readouterr().err


def test_tensorboard_at_a_port_in_use_starts_no_pod(run, cluster, capfd):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        words = ["cluster", "tensorboard", run, "--port", str(port)]
        error = isorun(capfd, *words, expect=64)
    assert f"Port {port} of this machine cannot be used (Address already in use)" in error
    assert len(cluster.pods()) == 2


def archive(*members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w|") as made:
        for name, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, 4 if kind == tarfile.REGTYPE else 0
            info.linkname = "/etc" if kind == tarfile.SYMTYPE else ""
            made.addfile(info, io.BytesIO(b"data"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        archive(("good", tarfile.REGTYPE), ("../outside", tarfile.REGTYPE)),
        archive(("good", tarfile.REGTYPE), ("/tmp/isorun-outside", tarfile.REGTYPE)),
        archive(("link", tarfile.SYMTYPE), ("link/outside", tarfile.REGTYPE)),
        archive(("pipe", tarfile.FIFOTYPE)),
        archive(("good", tarfile.REGTYPE))[:700],
        b"no archive",
    ],
    ids=["above", "absolute", "link", "pipe", "cut", "other"],
)
def test_nothing_of_an_archive_that_no_pod_should_send_is_kept(run, tmp_path, monkeypatch, data):
    (tmp_path / "sent").write_bytes(data)
    monkeypatch.setattr(copies, "files_command", lambda *_: ["cat", str(tmp_path / "sent")])
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(RetryError):
        copies.copy(find_run(run), ".", tmp_path / "all")
    assert sorted({p.name for p in tmp_path.iterdir()} - {"calls"}) == before
