"""Code that is sent by the volume with the runs (-cfg sync=true with a large tree)."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.kubernetes import code_carrier, code_volume, helper_pod, receive_code
from launch.kubernetes.cluster import connect
from launch.kubernetes.code_bundle import CodeBundle
from launch.kubernetes.code_volume import Volume
from launch.kubernetes.rendering import Rendered
from launch.kubernetes.scheduler import create_scheduler
from launch.torchx.components import fit
from tests.launch.kubernetes.test_pod_security import violations
from tests.launch.kubernetes.test_schemas import VERSIONS, checked
from tests.support.cluster import Refused
from tests.support.runs import ROOT
from train.exits import RetryError, UsageError

ARCHIVE = bytes(range(256)) * 5000
BUNDLE = CodeBundle(ARCHIVE, ".", 1, {})
NAME = f"{BUNDLE.digest.removeprefix('sha256:')}.tar.gz"
OLD = time.time() - (receive_code.KEPT_DAYS + 1) * 86400
KUBECTL = """#!{python}
import subprocess, sys
words = [word.replace("/runs/", "{volume}/") for word in sys.argv[sys.argv.index("--") + 1:]]
with open("{folder}/calls", "a") as calls:
    print(*sys.argv[1:sys.argv.index("--")], words[5], file=calls)
data = sys.stdin.buffer.read()
if "receive" in words and {cut}:
    data = data[:-{cut}]
done = subprocess.run([sys.executable, *words[1:]], input=data)
if done.returncode:
    print("command terminated with exit code", done.returncode, file=sys.stderr)
sys.exit(done.returncode)
"""


@pytest.fixture
def archive(tmp_path):
    """Where the archive is to be, on a volume."""
    return tmp_path / "volume/.code" / NAME


def receive(archive, data=ARCHIVE):
    archive.parent.parent.mkdir(exist_ok=True)
    return receive_code.receive(io.BytesIO(data), archive, BUNDLE.digest, len(ARCHIVE))


def names(archive):
    return sorted(path.name for path in archive.parent.iterdir())


def test_what_was_received_is_found(archive):
    assert not receive_code.has(archive, BUNDLE.digest)
    assert receive(archive) == ""
    assert archive.read_bytes() == ARCHIVE
    os.utime(archive, (OLD, OLD))
    assert receive_code.has(archive, BUNDLE.digest)
    assert archive.stat().st_mtime > OLD, "it is in use"
    assert names(archive) == [NAME]


@pytest.mark.parametrize(
    "data", [b"", ARCHIVE[:-1], b"x" + ARCHIVE[1:]], ids=["empty", "cut", "other"]
)
def test_nothing_of_an_interrupted_upload_is_used(archive, data):
    assert "The code arrived damaged; " in receive(archive, data)
    assert names(archive) == []
    assert receive(archive) == ""
    assert "arrived damaged" in receive(archive, data)
    assert archive.read_bytes() == ARCHIVE, "that of an earlier upload stays"


def test_a_damaged_archive_is_sent_again(archive):
    receive(archive)
    archive.write_bytes(b"damaged")
    assert not receive_code.has(archive, BUNDLE.digest)
    assert receive(archive) == ""
    assert receive_code.has(archive, BUNDLE.digest)


def test_two_launches_of_the_same_tree_do_not_disturb_each_other(archive):
    class Interrupted(io.BytesIO):
        """In the middle of it, another launch sends the same, and one that reads it."""

        others = 1

        def read(self, size):
            if self.tell() and self.others:
                self.others -= 1
                assert receive(archive) == ""
                assert receive_code.has(archive, BUNDLE.digest)
            return super().read(size)

    archive.parent.parent.mkdir()
    source = Interrupted(ARCHIVE)
    assert receive_code.receive(source, archive, BUNDLE.digest, len(ARCHIVE)) == ""
    assert source.others == 0
    assert archive.read_bytes() == ARCHIVE
    assert names(archive) == [NAME]


def test_what_no_run_uses_is_removed_after_some_time(archive):
    archive.parent.mkdir(parents=True)
    made = {
        f"{'a' * 64}.tar.gz": OLD, f"{'b' * 64}.tar.gz": OLD + 2 * 86400, "notes.txt": OLD,
        f"{'c' * 64}.tar.gz.12.half": OLD, f"{'d' * 64}.tar.gz.12.half": time.time(),
    }  # fmt: skip
    for name, at in made.items():
        (archive.parent / name).write_text("x")
        os.utime(archive.parent / name, (at, at))
    receive(archive)
    gone = {f"{'a' * 64}.tar.gz", f"{'c' * 64}.tar.gz.12.half"}
    assert set(names(archive)) == (made.keys() - gone) | {NAME}


def test_an_archive_that_is_used_again_meanwhile_stays(archive, monkeypatch):
    archive.parent.mkdir(parents=True)
    used = archive.with_name(f"{'a' * 64}.tar.gz")
    used.write_text("x")
    os.utime(used, (OLD, OLD))
    rename = Path.rename

    def use_then_rename(path, to):
        if path == used:
            os.utime(used)
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", use_then_rename)
    receive(archive)
    assert used.read_text() == "x"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda place: place.symlink_to(place.parent),
            ".code is a link, which could lead anywhere",
        ),
        (lambda place: place.write_text(""), "cannot be stored in {place} on the volume with the"),
    ],
)
def test_a_volume_that_cannot_store_it_is_one_sentence(archive, capsys, monkeypatch, spoil, said):
    archive.parent.parent.mkdir()
    spoil(archive.parent)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(ARCHIVE)))
    words = ["receive", str(archive), BUNDLE.digest, str(len(ARCHIVE))]
    assert receive_code.main(words) == 75
    (line,) = capsys.readouterr().err.splitlines()
    assert said.format(place=archive.parent) in line


def test_a_run_without_a_volume_is_refused():
    pod = {"spec": {"containers": [{}], "volumes": [{"name": "runs", "emptyDir": {}}]}}
    job = {"kind": "Job", "metadata": {"name": "x"}, "spec": {"template": pod}}
    with pytest.raises(
        UsageError, match="which only a volume with the runs or an object .* -cfg sync_store=s3://"
    ):
        Volume(BUNDLE).complete(Rendered([job], []))
    pod["spec"]["volumes"] = [{"name": "runs", "hostPath": {"path": "/mnt/runs"}}]
    Volume(BUNDLE).complete(Rendered([job], []))


def use_pods(tmp_path, monkeypatch, cut=0):
    """`kubectl exec` runs programs on this machine, with the volume in the directory `volume`;
    ``cut``: what it loses of an upload, in bytes."""
    program = tmp_path / "kubectl"
    text = KUBECTL.format(
        python=sys.executable, volume=tmp_path / "volume", folder=tmp_path, cut=cut
    )
    program.write_text(text)
    program.chmod(0o755)
    (tmp_path / "volume").mkdir(exist_ok=True)
    monkeypatch.setenv("ISORUN_KUSTOMIZE", str(program))


def kinds(cluster):
    return {each["kind"] for each in cluster.objects.values()}


@pytest.mark.process
@pytest.mark.parametrize("components", [[], ["trainjob"]])
def test_a_large_tree_goes_to_the_pods_by_the_volume(
    tmp_path, monkeypatch, cluster, components, capfd
):
    top = tmp_path / "tree"
    top.mkdir()
    subprocess.run(["git", "init", "-q"], cwd=top, check=True)
    (top / "mine.py").write_text("mine")
    (top / "data.bin").write_bytes(os.urandom(3000))
    monkeypatch.chdir(top)
    monkeypatch.setattr(code_carrier, "PART", 300)
    scheduler = create_scheduler("test")
    app = fit(config=[str(ROOT / "configs/text.yaml")], j="2x1")
    cfg = {"overlay": "cpu-demo", "components": components, "sync": True}
    made = scheduler.submit_dryrun(app, cfg)
    digest, objects = made.request.code.bundle.digest, made.request.rendered.objects
    assert checked(objects, VERSIONS[-1]) == {}
    name = f"{digest.removeprefix('sha256:')}.tar.gz"
    path = tmp_path / "volume/.code" / name

    created = []
    create = cluster.create
    monkeypatch.setattr(cluster, "create", lambda *how: created.append(how[2]) or create(*how))
    use_pods(tmp_path, monkeypatch, cut=3)
    with pytest.raises(RetryError, match="The code arrived damaged; 3 of its "):
        scheduler.schedule(made)
    assert not path.exists()
    assert not {"Pod", "Job", "TrainJob"} & kinds(cluster), "there is no run without its code"

    use_pods(tmp_path, monkeypatch)
    if components:  # the server of the tests has no TrainJobs
        made.request.code.send(connect("ml"), made.request.rendered)
    else:
        scheduler.schedule(made)
    assert path.read_bytes() == made.request.code.bundle.archive
    pod = [each for each in created if each["kind"] == "Pod"][-1]
    assert violations(pod) == []
    assert pod["metadata"]["labels"] == {"app.kubernetes.io/name": "isorun-code"}
    assert "PersistentVolumeClaim" in kinds(cluster), "it exists before the pod"
    assert not [p for p in cluster.pods() if "-code-" in p["metadata"]["name"]], "deleted"
    said = capfd.readouterr().err
    assert "sending 0.0 MiB of code" in said

    made.request.code.send(connect("ml"), made.request.rendered)
    actions = [line.split()[-1] for line in (tmp_path / "calls").read_text().splitlines()]
    assert actions == ["has", "receive", "has", "receive", "has"], "it is sent once"
    assert "the code is on the volume already" in capfd.readouterr().err

    (map_,) = (each for each in objects if each["metadata"]["name"].endswith("-code-0"))
    assert "binaryData" not in map_
    template = code_volume.pod_template_of(made.request.rendered)
    assert template["metadata"]["annotations"]["isorun/code"] == digest
    (init,), (train,) = template["spec"]["initContainers"], template["spec"]["containers"]
    assert {"name": "runs", "mountPath": "/runs"} in init["volumeMounts"]
    assert init["args"][0] == f"/runs/.code/{name}"
    room = {k: train["resources"][k]["ephemeral-storage"] for k in ("requests", "limits")}
    assert room == {"requests": "1089Mi", "limits": "1089Mi"}, "scratch and code"
    (tmp_path / "unpack.py").write_text(map_["data"]["unpack.py"])
    (tmp_path / "isorun").mkdir()
    words = [str(path), str(tmp_path / "isorun"), *init["args"][2:]]
    subprocess.run([sys.executable, "-P", str(tmp_path / "unpack.py"), *words], check=True)
    assert (tmp_path / "isorun/code/mine.py").read_text() == "mine"


def test_a_pod_that_cannot_be_created_or_started_is_one_sentence(cluster, tmp_path, monkeypatch):
    use_pods(tmp_path, monkeypatch)
    monkeypatch.setattr(code_volume, "storing_pod", lambda _: pod())
    connected = connect("ml")
    rendered = Rendered([], [])
    cluster.refuse["POST", "pods"] = Refused(403, "Forbidden", "exceeded quota: pods")
    with pytest.raises(UsageError, match="refused to create the Pod x-code-1 .*exceeded quota"):
        Volume(BUNDLE).send(connected, rendered)
    monkeypatch.setattr(cluster, "start", lambda made: cluster.objects.pop(
        ("pods", "ml", made["metadata"]["name"])
    ))  # fmt: skip
    with pytest.raises(RetryError, match="x-code-1, which stores code on the volume with the runs"):
        Volume(BUNDLE).send(connected, rendered)


def pod():
    main = {"name": "code", "image": "isorun"}
    made = helper_pod.helper_pod("x", "code", {"containers": [main]})
    made["metadata"]["name"] = "x-code-1"
    return made
