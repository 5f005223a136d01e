"""Checkpoints and exports as artifacts of W&B, through the commands."""

import json

import pytest

pytest.importorskip("wandb")

from tests.support.forked import Command
from tests.support.runs import TINY
from tests.support.wandb_server import WandbServer
from train.checkpoint.manifest import Manifest

STEPS = ["length.steps=6", "checkpoint.every_steps=2", "evaluate.every_steps=2"]


@pytest.fixture(scope="module")
def server():
    with WandbServer() as server:
        yield server


def command(server, *words, expect=0):
    done = Command(*map(str, words), env=server.environment).wait()
    assert done.returncode == expect, done
    return done.stdout + done.stderr


def fit(server, directory, *words):
    track = ["track.tensorboard=false", *words]
    command(server, "fit", *TINY, f"run.dir={directory}", *STEPS, *track)
    return json.loads((directory / "run.json").read_text())["wandb_id"]


@pytest.fixture(scope="module")
def online(server, tmp_path_factory):
    """A run whose best and final checkpoints are in W&B, and its W&B id."""
    directory = tmp_path_factory.mktemp("online") / "run"
    return directory, fit(server, directory, "track.wandb=online", "track.wandb_checkpoints=best")


def final(server, wandb_id):
    return server.artifacts.aliased(f"checkpoint-{wandb_id}", "latest")


@pytest.mark.slow
@pytest.mark.normal
def test_a_run_sends_its_final_checkpoint_and_what_a_restore_needs(server, online):
    directory, wandb_id = online
    found = final(server, wandb_id)
    manifest = Manifest.read(directory / "checkpoints" / "step-000000000006")
    assert found.metadata["manifest_sha256"] == manifest.sha256
    assert found.metadata["metrics"] == manifest.metrics
    restored = {"run.json", "config.json", "attempts.jsonl", "ledger.bin", "metrics.jsonl"}
    assert {*found.files} == {"manifest.json", *manifest.files, *(f"run/{n}" for n in restored)}
    (dataset,) = server.artifacts.inputs(wandb_id)
    assert dataset.metadata["samples"] > 0
    said = command(server, "sync", directory)
    assert "W&B has all of its rows and checkpoints" in said


@pytest.mark.slow
@pytest.mark.normal
def test_an_export_follows_from_its_checkpoint_and_is_linked(server, online):
    directory, wandb_id = online
    words = ["export", *TINY, f"run.dir={directory}", "--form", "parameters"]
    said = command(server, *words, "--registry", "model/tiny")
    (model,) = server.artifacts.named(f"model-{wandb_id}")
    assert f"W&B: {model.name}, linked to wandb-registry-model/tiny" in said
    exported = directory / "exports" / "step-6"
    assert model.files == {path.name: path.read_bytes() for path in exported.iterdir()}
    assert {*model.aliases} == {"latest", "step-6"}
    (user,) = {
        run for run, artifact in server.artifacts.uses if artifact is final(server, wandb_id)
    }
    assert user == model.run != wandb_id
    ((linked, place, _),) = server.artifacts.links
    assert linked is model
    assert place == "org-entity/wandb-registry-model/tiny"
    said = command(server, *words, "--registry", "lost/tiny", expect=64)
    assert "did not link it to --registry wandb-registry-lost/tiny" in said
    assert "Traceback" not in said
    said = command(server, *words, "--registry", "tiny", expect=64)
    assert "write REGISTRY/COLLECTION" in said


@pytest.mark.slow
def test_a_sync_sends_the_checkpoints_of_an_offline_run(server, tmp_path):
    wandb_id = fit(server, tmp_path / "run", "track.wandb=offline", "track.wandb_checkpoints=all")
    assert final(server, wandb_id) is None
    server.fault = lambda operation: 500 if operation == "CreateArtifact" else None
    said = command(server, "sync", tmp_path / "run", "--timeout", 5, expect=75)
    assert "W&B did not take the checkpoints" in said
    server.fault = None
    said = command(server, "sync", tmp_path / "run")
    assert "sent the checkpoint of step 4" in said
    versions = server.artifacts.named(f"checkpoint-{wandb_id}")
    assert [version.metadata["step"] for version in versions] == [4, 6], "what is still there"
    assert final(server, wandb_id) is versions[-1]
    assert len(server.artifacts.inputs(wandb_id)) == 1
    assert server.runs[wandb_id].steps == list(range(1, 7))
