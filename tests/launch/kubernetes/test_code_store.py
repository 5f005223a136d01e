"""Code that is sent by an object store (-cfg sync_store=URL)."""

import datetime
import io
import os
import re
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from launch.kubernetes import code_store, unpack_code
from launch.kubernetes.checks import pods
from launch.kubernetes.code_bundle import CodeBundle
from launch.kubernetes.code_store import RENEWED_DAYS, Store, folder_url
from launch.kubernetes.component import render_component
from launch.kubernetes.scheduler import create_scheduler
from launch.torchx.components import fit
from tests.launch.kubernetes.test_pod_security import all_violations
from tests.launch.kubernetes.test_schemas import VERSIONS, checked
from tests.support.api_server import Server
from tests.support.cluster import Cluster
from tests.support.runs import ROOT
from train.exits import RetryError, UsageError


def archive():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as made:
        entry = tarfile.TarInfo("mine.py")
        entry.size = 4
        made.addfile(entry, io.BytesIO(b"mine"))
    return out.getvalue()


BUNDLE = CodeBundle(archive(), ".", 4, {})
AT = f".code/{BUNDLE.digest.removeprefix('sha256:')}.tar.gz"


def send(url):
    Store(BUNDLE, url).send(None, None)


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    return f"{request.param}://{tmp_path}/store"


def content(url):
    files, path = fsspec.url_to_fs(url)
    return {f"/{name}".split("/store/")[1]: files.cat_file(name) for name in files.find(path)}


def test_code_is_sent_once(url, capfd):
    send(url)
    assert content(url) == {AT: BUNDLE.archive}
    assert f"of code to {url}/{AT}" in capfd.readouterr().err
    send(url)
    said = capfd.readouterr().err
    assert f"the code is at {url}/{AT} already" in said
    assert "sending" not in said


@pytest.mark.parametrize("fails", [True, False], ids=["fails", "is silent"])
def test_an_interrupted_upload_is_not_used(tmp_path, monkeypatch, capfd, fails):
    url = f"memory://{tmp_path}/store"
    write = MemoryFileSystem.pipe_file

    def half(self, path, data, **how):
        write(self, path, data[:-3], **how)
        if fails:
            raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", half)
    with pytest.raises(RetryError, match="reset by peer" if fails else "bytes after the upload"):
        send(url)
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", write)
    send(url)
    assert content(url) == {AT: BUNDLE.archive}
    assert "already" not in capfd.readouterr().err


@pytest.mark.parametrize(("days", "renewed"), [(RENEWED_DAYS - 1, False), (RENEWED_DAYS + 1, True)])
def test_an_old_archive_is_renewed(url, days, renewed):
    """So that a rule that removes old objects does not count from the first upload."""
    send(url)
    then = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days)
    files, path = fsspec.url_to_fs(f"{url}/{AT}")
    if url.startswith("file"):
        os.utime(path, (then.timestamp(), then.timestamp()))
    else:
        files.store[path].modified = then
    send(url)
    assert (files.modified(path) > then + datetime.timedelta(days=1)) is renewed


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "must be the URL of a folder that both this machine and the pods reach"),
        ("bucket/folder", "must be the URL of a folder"), ("s3://", "must be the URL of a folder"),
        ("file:///mnt/code", "for a volume of the pods use -cfg sync_volume=true"),
        ("memory://code", "must be the URL of a folder"),
        ("s3://AKIAX:abc123secret@bucket/x", "has a secret in its URL"),
        ("https://host/x?X-Amz-Signature=abc123def", "has a secret in its URL"),
    ],
)  # fmt: skip
def test_a_url_that_cannot_carry_code_is_refused(url, said):
    with pytest.raises(UsageError, match=said) as refusal:
        folder_url(url)
    assert "abc123" not in str(refusal.value)
    assert folder_url("s3://bucket/folder/") == "s3://bucket/folder"


def test_one_place_is_chosen():
    app = fit(config=[str(ROOT / "configs/text.yaml")], j="1x1")
    cfg = {"overlay": "cpu-demo", "sync_volume": True, "sync_store": "s3://bucket/x"}
    with pytest.raises(UsageError, match="sync_store and sync_volume cannot be combined"):
        create_scheduler("test").submit_dryrun(app, cfg)


def unpack(source, target, capsys):
    """The exit code and the line that is said."""
    target.mkdir(exist_ok=True)
    capsys.readouterr()
    code = unpack_code.main([source, str(target), ".", BUNDLE.digest])
    return code, capsys.readouterr().err.strip()


def test_the_pods_use_only_what_was_sent(url, tmp_path, capsys):
    place, target = f"{url}/{AT}", tmp_path / "isorun"
    code, said = unpack(place, target, capsys)
    assert code == 64
    assert f"isorun: error: The code of this run is not at {place} (" in said
    send(url)
    files, path = fsspec.url_to_fs(place)
    files.pipe_file(path, BUNDLE.archive[:-1] + b"x")
    code, said = unpack(place, target, capsys)
    assert code == 64
    assert f"not {BUNDLE.digest}; remove {place} and submit it again." in said
    assert list(target.iterdir()) == []
    files.rm_file(path)
    send(url)
    assert unpack(place, target, capsys) == (0, "")
    assert (target / "code/mine.py").read_text() == "mine"
    assert sorted(each.name for each in target.iterdir()) == ["code", "notes"]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("gs://bucket/x", "lacks the driver of gs://.* build an image with isorun.gcs. .EXTRAS"),
        ("nosuch://bucket/x", "lacks the driver of nosuch:// .*; build an image with it."),
    ],
)
def test_an_image_without_the_driver_is_named(url, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    code, line = unpack(url, tmp_path, capsys)
    assert code == 64
    assert len(line.splitlines()) == 1
    assert re.search(said, line)
    with pytest.raises(UsageError, match=f"sync_store is '{url}', which cannot be used"):
        send(url)


@pytest.fixture
def s3(bucket, monkeypatch):
    """An S3 server, at the address that the environment names."""
    import s3fs

    url, options = bucket
    monkeypatch.setenv("AWS_ENDPOINT_URL", options["endpoint_url"])
    s3fs.S3FileSystem.clear_instance_cache()  # it keeps the address and the credentials
    yield url
    s3fs.S3FileSystem.clear_instance_cache()


def check_credentials(is_on):
    """Whether the server checks credentials from now on."""
    address = f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
    asked = urllib.request.Request(
        address, b"0" if is_on else b"inf", {"Content-Type": "text/plain"}
    )
    urllib.request.urlopen(asked, timeout=10).close()


@pytest.mark.normal
@pytest.mark.process
def test_code_goes_by_a_real_store(s3, tmp_path, capfd):
    url = f"{s3}/{tmp_path.name}"
    send(url)
    send(url)
    assert f"the code is at {url}/{AT} already" in capfd.readouterr().err
    target = tmp_path / "isorun"
    target.mkdir()
    program = Path(unpack_code.__file__).read_text()
    words = [f"{url}/{AT}", str(target), ".", BUNDLE.digest]
    subprocess.run([sys.executable, "-P", "-", *words], input=program, text=True, check=True)
    assert (target / "code/mine.py").read_text() == "mine"


@pytest.mark.normal
def test_wrong_credentials_are_one_sentence(s3, tmp_path, capsys):
    url = f"{s3}/{tmp_path.name}"
    check_credentials(True)
    try:
        with pytest.raises(UsageError, match="refused the code .PermissionError.*; correct your"):
            send(url)
        code, said = unpack(f"{url}/{AT}", tmp_path / "isorun", capsys)
    finally:
        check_credentials(False)
    assert code == 64
    assert f"cannot be read from {url}/{AT} (PermissionError: " in said
    assert "check the credentials of the pods (component object-store)" in said
    assert len(said.splitlines()) == 1


@pytest.mark.normal
def test_a_store_that_is_not_reached_is_one_sentence(s3, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(RetryError, match="cannot be sent to .*; rerun when this machine can reach"):
        send(s3)
    code, said = unpack(f"{s3}/{AT}", tmp_path / "isorun", capsys)
    assert code == 75
    assert "AWS_ENDPOINT_URL and their network" in said
    assert len(said.splitlines()) == 1


@pytest.fixture
def tree(tmp_path, monkeypatch):
    top = tmp_path / "tree"
    top.mkdir()
    subprocess.run(["git", "init", "-q"], cwd=top, check=True)
    (top / "mine.py").write_text("mine")
    monkeypatch.chdir(top)


OPTIONS = {
    "AWS_ENDPOINT_URL": "http://minio.storage:9000", "AWS_CA_BUNDLE": "/certificates/ca.pem",
    "HTTPS_PROXY": "http://proxy:3128", "NCCL_DEBUG": "INFO",
}  # fmt: skip


@pytest.mark.process
@pytest.mark.parametrize("kind", [[], ["trainjob"]], ids=["job", "trainjob"])
def test_the_init_container_reaches_the_store_as_the_training_does(tree, monkeypatch, kind):
    def refuse(*_):
        raise AssertionError("a dry run sends nothing")

    monkeypatch.setattr(code_store, "open_storage", refuse)
    mounts = ["type=volume", "src=certificates", "dst=/certificates", "readonly"]
    app = fit(
        config=[str(ROOT / "configs/text.yaml")], j="2x1", env=OPTIONS,
        mounts=[*mounts, "type=volume", "src=data", "dst=/data"],
    )  # fmt: skip
    components = ["object-store", "wandb-secret", *kind]
    cfg = {"overlay": "cpu-demo", "components": components, "sync_store": "s3://bucket/folder/"}
    made = create_scheduler("test").submit_dryrun(app, cfg)
    objects = made.request.rendered.objects
    assert checked(objects, VERSIONS[-1]) == {}
    assert all_violations(objects) == []
    digest = made.request.code.bundle.digest
    place = f"s3://bucket/folder/.code/{digest.removeprefix('sha256:')}.tar.gz"
    assert place in str(made)
    (map_,) = (each for each in objects if each["metadata"]["name"].endswith("-code-0"))
    assert "binaryData" not in map_
    (pod,) = (pod for _, pod in pods(objects))
    (init,), (train,) = pod["initContainers"], pod["containers"]
    assert init["args"] == [place, "/isorun", ".", digest]
    env = {each["name"]: each for each in train["env"]}
    assert "WANDB_API_KEY" in env
    given = {
        "AWS_CA_BUNDLE", "AWS_ENDPOINT_URL", "AWS_SHARED_CREDENTIALS_FILE",
        "GOOGLE_APPLICATION_CREDENTIALS", "HTTPS_PROXY",
    }  # fmt: skip
    assert {each["name"]: each for each in init["env"]} == {name: env[name] for name in given}
    mounted = {each["mountPath"]: each for each in init["volumeMounts"]}
    assert mounted.keys() == {
        "/isorun", "/isorun-parts", "/etc/object-store", "/certificates"
    }  # fmt: skip
    assert mounted["/etc/object-store"] in train["volumeMounts"]


@pytest.mark.process
def test_there_is_no_run_without_its_code(tree, tmp_path, monkeypatch, capfd):
    place = f"memory://{tmp_path}/store"
    open_storage = code_store.open_storage
    stores = iter([f"nosuch://{tmp_path}", place])
    monkeypatch.setattr(
        code_store, "open_storage", lambda url, *more: open_storage(next(stores), *more)
    )
    app = fit(config=[str(ROOT / "configs/text.yaml")], j="1x1")
    cfg = {"overlay": "cpu-demo", "sync_store": "s3://bucket/folder"}
    cluster = Cluster()
    with Server(cluster, tmp_path) as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
        scheduler = create_scheduler("test")
        made = scheduler.submit_dryrun(app, cfg)
        with pytest.raises(UsageError, match="cannot be used"):
            scheduler.schedule(made)
        assert cluster.objects == {}
        scheduler.schedule(made)
        assert cluster.pods()
    assert list(content(place).values()) == [made.request.code.bundle.archive]

    words = ["-j", "1x1", "--config", str(ROOT / "configs/text.yaml")]
    given = ["--cfg", "overlay=cpu-demo,sync_store=s3://bucket/folder"]
    render_component("isorun.fit", [*given, *words])
    assert "where only `torchx run` stores it, and not `isorun render`" in capfd.readouterr().err
