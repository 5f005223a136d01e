"""Code that is sent with a submission (-cfg sync=true)."""

import base64
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from launch.history import launch_log
from launch.kubernetes import code_bundle, code_carrier
from launch.kubernetes.code_bundle import collect
from launch.kubernetes.code_carrier import ConfigMaps
from launch.kubernetes.run_code import _policies
from launch.kubernetes.scheduler import create_scheduler
from launch.kubernetes.unpack_code import differences, main
from launch.torchx.components import fit
from tests.launch.kubernetes.test_pod_security import all_violations
from tests.launch.kubernetes.test_schemas import VERSIONS, checked
from tests.support.runs import ROOT
from train.code.version import code_version
from train.exits import UsageError

SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----\nx\n"


def git(*words, cwd):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *identity, *words], cwd=cwd, check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository with files of each kind."""
    top = tmp_path / "tree"
    (top / "mine").mkdir(parents=True)
    git("init", "-q", cwd=top)
    (top / ".gitignore").write_text("*.bin\nruns/\n")
    (top / "mine" / "task.py").write_text("tracked")
    (top / "mine" / "secrets.py").write_text("a module")
    (top / "gone.py").write_text("removed later")
    git("add", ".", cwd=top)
    git("commit", "-qm", "first", cwd=top)
    (top / "gone.py").unlink()
    (top / "mine" / "task.py").write_text("changed")
    (top / "ünew file.py").write_text("not tracked")
    (top / "run.sh").write_text("#!/bin/sh\n")
    (top / "run.sh").chmod(0o700)
    (top / "data.bin").write_text("ignored")
    (top / "runs").mkdir()
    (top / "runs" / "metrics").write_text("ignored")
    (top / "link.py").symlink_to("mine/task.py")
    monkeypatch.chdir(top)
    return top


def contents(bundle):
    with tarfile.open(fileobj=io.BytesIO(bundle.archive)) as archive:
        return {
            each.name: each.linkname or archive.extractfile(each).read().decode()
            for each in archive
        }


def test_a_bundle_has_the_files_of_the_working_tree_as_they_are(tree):
    found = collect()
    assert contents(found) == {
        ".gitignore": "*.bin\nruns/\n", "mine/task.py": "changed", "mine/secrets.py": "a module",
        "ünew file.py": "not tracked", "run.sh": "#!/bin/sh\n", "link.py": "mine/task.py",
    }  # fmt: skip
    assert found.notes == []
    assert found.directory == "."
    assert found.version["dirty"] is True
    assert len(found.version["commit"]) == 40


def test_the_same_files_have_the_same_digest(tree, monkeypatch):
    before = collect().digest
    for path in tree.rglob("*.py"):
        os.utime(path, (1, 1), follow_symlinks=False)
    (tree / "run.sh").chmod(0o755)
    assert collect().digest == before
    monkeypatch.chdir(tree / "mine")
    below = collect()
    assert (below.digest, below.directory) == (before, "mine")
    (tree / "run.sh").chmod(0o644)
    assert collect().digest != before


@pytest.mark.parametrize(
    ("name", "make", "note"),
    [
        (".env", lambda path: path.write_text("A=1"), ".env is not sent, because of a name or"),
        ("k.py", lambda path: path.write_text(SECRET), "k.py is not sent, because of a name or"),
        ("out", lambda path: path.symlink_to("/etc/passwd"), "out is not sent: neither a file"),
        ("up", lambda path: path.symlink_to("../x"), "up is not sent: neither a file nor"),
        ("pipe.py", lambda path: path.symlink_to("nowhere"), "pipe.py is not sent: neither"),
    ],
)
def test_what_is_left_out_is_named(tree, name, make, note):
    before = contents(collect())
    make(tree / name)
    found = collect()
    assert contents(found) == before
    (said,) = found.notes
    assert note in said


def test_a_repository_within_the_tree_is_left_out(tree):
    inner = tree / "inner"
    inner.mkdir()
    git("init", "-q", cwd=inner)
    (inner / "a.py").write_text("x")
    git("add", ".", cwd=inner)
    git("commit", "-qm", "x", cwd=inner)
    assert any("inner" in note for note in collect().notes)


def test_a_tree_that_is_too_large_is_refused(tree, monkeypatch):
    monkeypatch.setattr(code_bundle, "_LARGEST", 5)
    with pytest.raises(UsageError, match="but at most 0 MiB can be sent") as refusal:
        collect()
    assert "(largest: .gitignore (12 bytes), " in str(refusal.value)
    assert "ignore data in .gitignore" in str(refusal.value)


def test_a_file_that_cannot_be_read_is_named(tree, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UsageError, match=r"\.gitignore cannot be read \(Permission denied\)"):
        collect()


def test_a_directory_without_a_repository_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(UsageError, match="but it is in no git repository; run `git init` there"):
        collect()


def parts_of(bundle, folder):
    folder.mkdir()
    for number, part in enumerate(ConfigMaps(bundle).parts):
        (folder / f"part-{number}").write_bytes(part)
    return folder


@pytest.mark.parametrize("size", [7, 100, 1 << 20])
def test_what_is_unpacked_is_what_was_sent(tree, tmp_path, monkeypatch, size):
    monkeypatch.setattr(code_carrier, "PART", size)
    bundle = collect()
    target = tmp_path / "isorun"
    target.mkdir()
    words = [str(parts_of(bundle, tmp_path / "parts")), str(target), "mine", bundle.digest]
    assert main(words) == 0
    assert main(words) == 0, "a container may start again"
    code = target / "code"
    assert {p.relative_to(code).as_posix(): p.read_text() for p in code.rglob("*.*")} == {
        **contents(bundle), "link.py": "changed"
    }  # fmt: skip
    assert os.access(code / "run.sh", os.X_OK)
    assert (code / "mine" / "runs").readlink() == Path("/runs")
    assert (target / "notes").read_text() == ""


def test_damaged_code_is_not_used(tree, tmp_path, capsys):
    bundle = collect()
    parts = parts_of(bundle, tmp_path / "parts")
    (parts / "part-0").write_bytes(bundle.archive[:-1] + b"x")
    assert main([str(parts), str(tmp_path), ".", bundle.digest]) == 64
    assert f"not {bundle.digest}; submit it again" in capsys.readouterr().err
    assert not (tmp_path / "code").exists()


def test_code_is_unpacked_from_the_volume_or_is_missing_there(tree, tmp_path, capsys):
    bundle = collect()
    archive, target = tmp_path / "x.tar.gz", tmp_path / "isorun"
    target.mkdir()
    words = [str(archive), str(target), ".", bundle.digest]
    assert main(words) == 64
    assert f"not in {archive} on the volume with the runs any more" in capsys.readouterr().err
    archive.write_bytes(bundle.archive[:-1])
    assert main(words) == 64
    assert f"not {bundle.digest}; submit it again" in capsys.readouterr().err
    assert list(target.iterdir()) == []
    archive.write_bytes(bundle.archive)
    os.utime(archive, (1, 1))
    assert main(words) == 0
    assert (target / "code/mine/task.py").read_text() == "changed"
    assert sorted(p.name for p in target.iterdir()) == ["code", "notes"]
    assert archive.stat().st_mtime > 1, "it is in use"


def test_other_versions_of_packages_are_named(tmp_path):
    (tmp_path / "constraints.txt").write_text(
        "# pins\nnumpy==0.1  # old\npytest>=1\nno-such-package==1\n--hash=x\n???\n"
        "torch==0.1; python_version < '3'\n"
    )
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["no-such-package>=2", "pytest", "pyyaml<1"]\n'
    )
    found = differences(tmp_path)
    assert len(found) == 3
    assert found[0].startswith("The image has numpy ")
    assert "but constraints.txt of the submitted code has numpy==0.1." in found[0]
    assert "needs no-such-package>=2, which the image lacks" in found[1]
    assert "The image has pyyaml " in found[2]
    (tmp_path / "pyproject.toml").write_text("not toml [")
    assert len(differences(tmp_path)) == 1


def app(**words):
    return fit(
        config=[str(ROOT / "configs/text.yaml")], j="2x1", env={"PYTHONPATH": "/more"}, **words
    )


@pytest.mark.process
@pytest.mark.parametrize("components", [[], ["jobset"]])
def test_the_pods_use_the_code_read_only_before_the_installed_one(
    tree, tmp_path, monkeypatch, cluster, components
):
    monkeypatch.setattr(code_carrier, "PART", 300)
    monkeypatch.chdir(tree / "mine")
    bundle = collect()
    scheduler = create_scheduler("test")
    cfg = {"overlay": "cpu-demo", "sync": True, "components": components}
    made = scheduler.submit_dryrun(app(), cfg)
    objects = made.request.rendered.objects
    assert checked(objects, VERSIONS[-1]) == {}
    assert all_violations(objects) == []
    text = str(made)
    assert bundle.digest in text
    assert base64.b64encode(ConfigMaps(bundle).parts[0]).decode() not in text, (
        "it is not for reading"
    )
    name = scheduler.schedule(made).split(":")[1]
    maps = {
        each["metadata"]["name"]: each
        for each in cluster.objects.values() if each["kind"] == "ConfigMap"
    }  # fmt: skip
    assert list(maps) == [f"{name}-code-{n}" for n in range(len(ConfigMaps(bundle).parts))]
    assert len(maps) > 1
    pod = cluster.pods()[0]
    assert pod["metadata"]["annotations"]["isorun/code"] == bundle.digest
    (init,), (train,) = pod["spec"]["initContainers"], pod["spec"]["containers"]
    assert init["image"] == train["image"]
    env = {each["name"]: each.get("value") for each in train["env"]}
    assert env["PYTHONPATH"] == "/isorun/code/mine:/isorun/code:/more"
    assert train["workingDir"] == "/isorun/code/mine"
    (mount,) = (m for m in train["volumeMounts"] if m["name"] == "code")
    assert mount == {"name": "code", "mountPath": "/isorun", "readOnly": True}

    # What the kubelet and the init container do with it.
    parts, target = tmp_path / "parts", tmp_path / "isorun"
    parts.mkdir()
    target.mkdir()
    (volume,) = (v for v in pod["spec"]["volumes"] if v["name"] == "code-parts")
    for source in volume["projected"]["sources"]:
        found = maps[source["configMap"]["name"]]
        for key, value in found["binaryData"].items():
            (parts / key).write_bytes(base64.b64decode(value))
        for key, value in found.get("data", {}).items():
            (parts / key).write_text(value)
    words = [w.replace(init["args"][0], str(parts)) for w in [*init["command"], *init["args"]]]
    words[words.index("/isorun")] = str(target)
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (target / "code" / "mine" / "task.py").read_text() == "changed"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("ISORUN_CODE_VERSION", env["ISORUN_CODE_VERSION"])
    recorded = code_version()
    assert recorded.pop("isorun")
    assert recorded == {**bundle.version, "bundle": bundle.digest}

    scheduler.delete(f"ml:{name}")
    assert "ConfigMap" not in {each["kind"] for each in cluster.objects.values()}


@pytest.mark.parametrize(
    ("component", "final", "retried"),
    [
        ("time-limit", "FailJob", "Ignore"),
        ("independent", "FailIndex", "Ignore"),
        ("jobset", "FailJob", "FailJob"),  # the JobSet restarts then
        ("trainjob", "FailJob", "FailJob"),
    ],
)
def test_exit_codes_of_the_init_container_mean_the_same(tree, component, final, retried):
    cfg = {"overlay": "cpu-demo", "sync": True, "components": [component], "time_limit": 60}
    rendered = create_scheduler("test").submit_dryrun(app(), cfg).request.rendered
    assert checked(rendered.objects, VERSIONS[-1]) == {}
    (policy,) = _policies(rendered.objects)
    actions = {}
    for rule in policy["rules"]:
        if codes := rule.get("onExitCodes"):
            of = actions.setdefault(codes["containerName"], {})
            of.update(dict.fromkeys(codes["values"], rule["action"]))
    assert len(actions) == 2
    own = actions.pop("code")
    assert [own] == list(actions.values())
    assert (own[64], own[75], own[143]) == (final, retried, retried)


@pytest.mark.process
def test_the_launch_log_has_the_digest_and_not_the_code(tree, cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    made = create_scheduler("test").submit_dryrun(app(), {"overlay": "cpu-demo", "sync": True})
    launch_log.record_start("kubernetes_job://test/ml:x", "kubernetes_job", app(), str(made))
    (line,) = launch_log.read()
    assert collect().digest in line["request"]
    assert base64.b64encode(collect().archive).decode() not in line["request"]


@pytest.mark.parametrize("value", ["", "{", "[]", '{"commit": 3, "other": 1}', '"text"'])
def test_a_wrong_code_version_is_ignored(monkeypatch, value):
    monkeypatch.setenv("ISORUN_CODE_VERSION", value)
    assert code_version().keys() <= {"isorun", "commit", "dirty", "git"}
    assert not isinstance(code_version().get("commit"), int)


@pytest.mark.slow
@pytest.mark.process
def test_the_agent_logs_the_notes(tmp_path):
    notes = tmp_path / "notes"
    notes.write_text("The image has numpy 1, but ...\n")
    done = subprocess.run(
        [sys.executable, "-m", "launch.agent", "--", sys.executable, "-c", "pass"],
        cwd=ROOT, env={**os.environ, "ISORUN_CODE_NOTES": str(notes)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "warning: The image has numpy 1, but ..." in done.stderr


@pytest.mark.process
def test_a_failed_or_waiting_init_container_is_reported(tree, cluster):
    scheduler = create_scheduler("test")
    cluster.starts_pods = False
    app_id = scheduler.submit(app(), {"overlay": "cpu-demo", "sync": True})
    first, second = cluster.pods()
    waiting = {"reason": "ImagePullBackOff", "message": "no such image"}
    first["status"]["initContainerStatuses"] = [{"name": "code", "state": {"waiting": waiting}}]
    ended = {"exitCode": 75, "message": "isorun: error: The code of this run has the digest x"}
    second["status"] |= {
        "phase": "Failed",
        "initContainerStatuses": [{"name": "code", "state": {"terminated": ended}}],
    }
    found = scheduler.describe(app_id)
    assert "ImagePullBackOff: no such image" in found.msg
    assert "(exit 75): isorun: error: The code of this run has the digest x" in found.msg
    assert scheduler.exit_codes(app_id) == [75]
