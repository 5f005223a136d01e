"""Checkpoints as artifacts of W&B: the real client against the tests' server."""

import hashlib
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("wandb")

from tests.support.forked import quick
from tests.support.wandb_server import WandbServer
from tests.track.conftest import run_info
from tests.track.test_wandb_once import Run
from train.checkpoint.checkpoint_config import CheckpointConfig, MirrorConfig
from train.checkpoint.manifest import Manifest, hash_file
from train.checkpoint.mirror import Mirror
from train.checkpoint.store import CheckpointStore
from train.track.wandb_artifact import checkpoint_artifact, content_digest
from train.track.wandb_checkpoints import CheckpointSender
from train.track.wandb_sent import FILE, Sent, SentCheckpoint, missing_steps

ATTEMPT = """
import json, os, signal, sys, time
from pathlib import Path
from train.checkpoint.checkpoint_config import CheckpointConfig
from train.checkpoint.manifest import Manifest, hash_file
from train.checkpoint.store import CheckpointStore
from train.track.logs import setup_logging
from train.track.track_config import TrackConfig
from train.track.tracker import Tracker
from tests.track.conftest import run_info
from tests.track.wandb_file import service

directory, values = Path(sys.argv[1]), json.loads(sys.argv[2])
for name in ("run.json", "config.json", "attempts.jsonl"):
    if not (directory / name).exists():
        (directory / name).write_text(json.dumps({"id": "digits-20260101-000000-abcdef"}))
info = run_info(
    directory, attempt=values["attempt"], config=values["config"],
    facts={"dataset": {"samples": 1797, "fingerprint": "0123456789abcdef"}},
)
track = {"console": "quiet", "tensorboard": False, "wandb": "online", **values["track"]}
setup_logging(directory, 0, info.attempt, "INFO")
store = CheckpointStore(directory / "checkpoints")
tracker = Tracker(TrackConfig(**track), info, is_main=True, store=store)
tracker.log(values["attempt"], {"train/loss": 1.0})
for _ in range(8):
    tracker.wait_until_open()
before = {*sys.modules}

def commit(step, loss=None, size=2000):
    temporary = store.begin(step)
    (temporary / "__0_0.distcp").write_bytes(os.urandom(size))
    (temporary / "index.json").write_text(f"{{}}")
    files = {path.name: hash_file(path) for path in temporary.iterdir()}
    metrics = None if loss is None else {"loss": loss}
    state = {"run": info.id, "attempt": info.attempt}
    store.commit(temporary, Manifest(step, state, metrics, files))
    tracker.committed(step)

def wait(*steps, seconds=60):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            sent = json.loads((directory / "wandb_checkpoints.json").read_text())["checkpoints"]
        except FileNotFoundError:
            sent = {}
        if {*map(str, steps)} <= sent.keys():
            return
        time.sleep(0.05)
    raise SystemExit(f"not sent: {steps}")

def wait_for_file(name):
    while not (directory / name).exists():
        time.sleep(0.02)

def prune(keep):
    print("removed", store.prune(CheckpointConfig(keep_last=keep)))

def release():
    (directory / "go").touch()

def kill():
    for process in (service(os.getpid()), os.getpid()):
        os.kill(process, signal.SIGKILL)

def summary():
    tracker.summary({"loss": 0.5})

def time_close():
    started = time.monotonic()
    tracker.close()
    (directory / "closed").write_text(str(time.monotonic() - started))

for name, *arguments in values["actions"]:
    globals()[name](*arguments)
print("imported beside the training:", [m for m in sys.modules if m not in before])
tracker.close()
"""


class CheckpointRun(Run):
    """A run of which each attempt is a process that commits small checkpoints."""

    def act(self, *actions, expect=0, mode="all", config=None, **track):
        self.attempts += 1
        values = {
            "attempt": self.attempts, "actions": actions, "config": config or {},
            "track": {"wandb_checkpoints": mode, **track},
        }  # fmt: skip
        words = [str(self.directory), json.dumps(values)]
        return self._run(quick([sys.executable, "-c", ATTEMPT, *words]), expect)

    def isorun_sync(self, expect=0):
        command = [sys.executable, "-m", "train", "sync", str(self.directory)]
        return self._run(quick(command), expect)


COLLECTION = "checkpoint-digits-wandb-id"


@pytest.fixture
def server():
    with WandbServer() as server:
        yield server


@pytest.fixture
def run(tmp_path, server):
    return CheckpointRun(tmp_path, server.environment)


def by_step(server):
    """The committed artifacts by step; fails if there are two of one step."""
    artifacts = server.artifacts.named(COLLECTION)
    steps = [artifact.metadata["step"] for artifact in artifacts]
    assert len(steps) == len(set(steps))
    return dict(zip(steps, artifacts, strict=True))


def aliases(server):
    return {step: set(artifact.aliases) for step, artifact in by_step(server).items()}


@pytest.mark.slow
def test_each_checkpoint_is_an_artifact_with_its_files(run, server, tmp_path):
    committed = []

    def watch(operation):
        if operation == "CreateArtifact":
            committed.append(sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*")))

    server.fault = watch
    said = run.act(
        ["commit", 10, 0.5], ["wait", 10], ["commit", 20, 0.3], ["wait", 20],
        ["commit", 30, 0.4], ["wait", 30], ["prune", 1], ["commit", 40], ["wait", 40],
    )  # fmt: skip
    assert committed[1] == ["step-000000000010"], "the dataset is first; never before the commit"
    assert "imported beside the training: []" in said, "a data worker could be forked meanwhile"
    found = by_step(server)
    assert aliases(server) == {10: set(), 20: {"best"}, 30: {"step-30"}, 40: {"latest", "step-40"}}
    for step in (30, 40):
        files = found[step].files
        manifest = json.loads(files["manifest.json"])
        assert {*files} == {
            "manifest.json", *manifest["files"], "run/run.json", "run/config.json",
            "run/attempts.jsonl", "run/metrics.jsonl",
        }  # fmt: skip
        for name, entry in manifest["files"].items():
            assert hashlib.sha256(files[name]).hexdigest() == entry["sha256"]
        metadata = found[step].metadata
        assert metadata["manifest_sha256"] == manifest["sha256"]
        assert metadata["run"] == "digits-20260101-000000-abcdef"
        assert metadata["size"] == sum(entry["size"] for entry in manifest["files"].values())
    assert found[30].metadata["metrics"] == {"loss": 0.4}
    assert {a.type for a in found.values()} == {"model"}
    (dataset,) = server.artifacts.inputs("digits-wandb-id")
    assert (dataset.type, dataset.metadata["fingerprint"]) == ("dataset", "0123456789abcdef")
    staged = [p for p in tmp_path.glob("wandb/**/*") if "staging" in p.parts and p.is_file()]
    assert not staged
    copies = [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size == 2000]
    assert len(copies) == 2, "only the checkpoints themselves"


@pytest.mark.slow
def test_only_the_best_and_the_final_one_are_uploaded(run, server):
    run.act(
        ["commit", 10, 0.5], ["wait", 10], ["commit", 20, 0.6], ["commit", 30, 0.4], ["wait", 30],
        ["commit", 40, 0.9], ["summary"], mode="best",
    )  # fmt: skip
    assert aliases(server) == {10: {"step-10"}, 30: {"best", "step-30"}, 40: {"latest", "step-40"}}
    before = server.operations.count("CreateArtifact")
    run.act(mode="best")  # nothing is sent twice, and the dataset is declared once
    assert server.operations.count("CreateArtifact") == before
    assert len(server.artifacts.inputs("digits-wandb-id")) == 1


@pytest.mark.slow
def test_references_name_the_files_where_they_are(run, server, tmp_path):
    run.act(["commit", 10], ["wait", 10], mode="reference")
    (artifact,) = by_step(server).values()
    folder = tmp_path / "checkpoints" / "step-000000000010"
    assert artifact.references == {
        name: (folder / name).as_uri() for name in Manifest.read(folder).files
    }
    assert {"manifest.json", "run/run.json"} <= {*artifact.files}
    assert "__0_0.distcp" not in artifact.files


@pytest.mark.slow
def test_a_kill_in_the_middle_of_an_upload_leaves_it_to_the_next_attempt(run, server, tmp_path):
    def fault(operation):
        if operation == "CreateArtifactFiles":
            (tmp_path / "begun").touch()
        is_first = not (tmp_path / "begun").exists()  # of the dataset
        return "hang" if operation == "artifact_upload" and not is_first else None

    server.fault = fault
    run.act(["commit", 10], ["wait_for_file", "begun"], ["kill"], expect=-9)
    assert by_step(server) == {}
    server.fault = None
    run.act(["wait", 10])
    assert aliases(server) == {10: {"latest", "step-10"}}


@pytest.mark.slow
@pytest.mark.parametrize("is_lost", [False, True])
def test_an_upload_that_was_not_remembered_is_not_repeated(run, server, tmp_path, is_lost):
    run.act(["commit", 10], ["wait", 10])
    path = tmp_path / FILE
    values = json.loads(path.read_text())
    path.unlink()
    if not is_lost:
        path.write_text(json.dumps(values | {"begun": [10], "checkpoints": {}}))
    run.act(["wait", 10])
    assert aliases(server) == {10: {"latest", "step-10"}}


@pytest.mark.slow
def test_a_checkpoint_is_kept_while_it_is_uploaded(run, server, tmp_path):
    def fault(operation):
        if operation == "CreateArtifactFiles":
            (tmp_path / "begun").touch()
            while not (tmp_path / "go").exists() and not server.ended.wait(0.02):
                pass

    server.fault = fault
    said = run.act(
        ["commit", 10], ["wait_for_file", "begun"], ["commit", 20], ["commit", 30], ["prune", 1],
        ["release"], ["wait", 10, 30], ["prune", 1],
    )  # fmt: skip
    assert "removed [20]\nremoved [10]" in said
    assert aliases(server) == {10: set(), 30: {"latest", "step-30"}}


FAULTS = {
    "500": lambda operation: 500 if "rtifact" in operation else None,
    "hangs": lambda operation: "hang" if operation == "artifact_upload" else None,
    "closed": lambda operation: "close" if "rtifact" in operation else None,
    "cut": lambda operation: "cut" if operation == "artifact_upload" else None,
    "hangs at the commit": lambda operation: "hang" if operation == "CommitArtifact" else None,
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_server_delays_no_end_and_gets_them_later(run, server, tmp_path, fault):
    server.fault = FAULTS[fault]
    output = run.act(["commit", 10, 0.5], ["commit", 20, 0.7], ["summary"], ["time_close"])
    assert float((tmp_path / "closed").read_text()) < 60
    assert output.count("W&B") == 1, output
    assert server.runs["digits-wandb-id"].steps == [1], "rows do not wait for artifacts"
    server.fault = None
    run.act(["wait", 10, 20])
    assert aliases(server) == {10: {"best", "step-10"}, 20: {"latest", "step-20"}}


def committed(directory, step=10):
    """A run directory with a checkpoint."""
    store = CheckpointStore(directory / "checkpoints")
    (directory / "run.json").write_text('{"id": "r"}')
    temporary = store.begin(step)
    (temporary / "__0_0.distcp").write_bytes(b"data")
    files = {"__0_0.distcp": hash_file(temporary / "__0_0.distcp")}
    store.commit(temporary, Manifest(step, {"run": "r"}, {"loss": float("inf")}, files))
    return store


def test_a_reference_into_a_mirror_is_made_once_the_copy_is_there(tmp_path):
    store = committed(tmp_path)
    url = f"file://{tmp_path}/mirror"
    run = run_info(tmp_path, id="r", config={"checkpoint": {"mirror": {"url": url}}})
    sender = CheckpointSender(run, store, "reference")
    assert sender.missing(ended=True) == []
    Mirror(MirrorConfig(url=url)).upload(store, 10, lambda: True)
    assert sender.missing(ended=True) == [10]
    (tmp_path / "metrics.jsonl").write_text("before")
    manifest = Manifest.read(store.path(10))
    artifact = checkpoint_artifact(run, store, manifest, "s3://bucket/run", "reference")
    (tmp_path / "metrics.jsonl").write_text("after")
    entries = artifact.manifest.entries
    assert entries["__0_0.distcp"].ref == "s3://bucket/run/step-000000000010/__0_0.distcp"
    assert Path(entries["run/metrics.jsonl"].local_path).read_text() == "before"
    assert {*entries} == {"__0_0.distcp", "manifest.json", "run/run.json", "run/metrics.jsonl"}
    assert artifact.metadata["mirror"] == "s3://bucket/run"
    assert artifact.metadata["metrics"] == {}, "W&B takes only finite numbers"


def test_a_checkpoint_that_was_made_again_is_sent_again(tmp_path):
    store = committed(tmp_path)
    manifest = Manifest.read(store.path(10))
    sent = Sent(tmp_path / FILE)
    for content, missing in ((content_digest(manifest), []), ("another", [10])):
        sent.checkpoints[10] = SentCheckpoint(content, "me/p/n:v0", None, ["latest", "step-10"])
        sent.save()
        assert CheckpointSender(run_info(tmp_path), store, "all").missing(ended=False) == missing


def test_readers_of_a_checkpoint_keep_it(tmp_path):
    store = committed(tmp_path)
    committed(tmp_path, 20)
    with store.pinned(10):
        with store.pinned(10):
            pass
        assert store.prune(CheckpointConfig(keep_last=1)) == [], "it has another reader"
    assert store.prune(CheckpointConfig(keep_last=1)) == [10]


STEPS = {10: {"loss": 0.5}, 20: {"loss": 0.3}, 30: None, 40: {"loss": float("nan")}}


@pytest.mark.parametrize(
    ("mode", "sent", "ended", "missing"),
    [
        ("all", (), False, [40, 30, 20, 10]),
        ("all", (20, 40), False, [30, 10]),
        ("reference", (10,), False, [40, 30, 20]),
        ("best", (), False, [20]),
        ("best", (), True, [40, 20]),
        ("best", (20,), False, []),
        ("best", (20, 40), True, []),
    ],
)
def test_what_w_and_b_lacks(tmp_path, mode, sent, ended, missing):
    known = Sent(tmp_path / FILE)
    for step in sent:
        known.checkpoints[step] = SentCheckpoint("", "", STEPS[step], [])
    assert missing_steps(mode, STEPS, known, ("loss", "min"), ended=ended) == missing


def test_a_better_one_that_was_removed_stays_best(tmp_path):
    sent = Sent(tmp_path / FILE)
    sent.checkpoints[5] = SentCheckpoint("", "", {"loss": 0.1}, ["best"])
    assert missing_steps("best", STEPS, sent, ("loss", "min"), ended=False) == []
    assert sent.aliases(("loss", "min"), [20], 20, {"loss": 0.3}) == {
        5: ["best"],
        20: ["latest", "step-20"],
    }
    assert missing_steps("best", STEPS, sent, ("loss", "max"), ended=False) == [10]


def test_what_was_sent_is_read_back_and_damage_is_not_fatal(tmp_path):
    sent = Sent.read(tmp_path)
    sent.dataset, sent.begun = "f", [20]
    sent.checkpoints[10] = SentCheckpoint("c", "me/p/n:v0", {"loss": 0.5}, ["latest"])
    sent.save()
    assert Sent.read(tmp_path) == sent
    for text in (
        "",
        "[]",
        '{"dataset": 1}',
        '{"dataset": null, "begun": [], "checkpoints": {"x": {}}}',
    ):
        sent.path.write_text(text)
        assert Sent.read(tmp_path).checkpoints == {}
