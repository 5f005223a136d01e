import json
import re
import time

from launch.contract import new_run_id, slug
from launch.torchx.run_ids import ids_of_run
from tests.launch.launching import fit
from tests.support.forked import run


def handed_down(made):
    return {k: v for k, v in made.env.items() if k.startswith(("ISORUN_", "WANDB_"))}


def test_a_new_run_gets_an_id_that_all_nodes_share():
    env = handed_down(fit("-j", "2x1", overrides=["run.name=mine"]))
    assert re.fullmatch(r"mine-\d{8}-\d{6}-[0-9a-f]{6}", env["ISORUN_RUN_ID"])
    assert env["WANDB_RUN_ID"] == env["ISORUN_RUN_ID"]
    assert env["WANDB_RUN_GROUP"] == "mine"
    assert env["WANDB_JOB_TYPE"] == "fit"
    again = handed_down(fit(overrides=["run.name=mine"]))
    assert again["ISORUN_RUN_ID"] != env["ISORUN_RUN_ID"]


def test_an_existing_run_keeps_its_identity(tmp_path):
    born = {"id": "old", "name": "mine", "wandb_id": "w1", "created": 1.0}
    (tmp_path / "run.json").write_text(json.dumps(born))
    env = handed_down(fit(overrides=[f"run.dir={tmp_path}"]))
    assert (env["ISORUN_RUN_ID"], env["WANDB_RUN_ID"]) == ("old", "w1")


def test_a_damaged_identity_is_left_for_train_to_refuse(tmp_path):
    for text in ("{", "[]", "{}", '{"id": "x"}'):
        (tmp_path / "run.json").write_text(text)
        assert ids_of_run("mine", "fit", tmp_path).run_id.startswith("mine-")


def test_an_identity_set_by_the_user_takes_precedence():
    env = handed_down(fit("--env", "ISORUN_RUN_ID=theirs,WANDB_RUN_GROUP=paper"))
    assert (env["ISORUN_RUN_ID"], env["WANDB_RUN_GROUP"]) == ("theirs", "paper")


def test_a_job_knows_when_it_was_submitted():
    before = time.time()
    submitted = float(handed_down(fit())["ISORUN_SUBMITTED_AT"])
    assert before - 0.01 <= submitted <= time.time() + 0.01
    assert handed_down(fit("--env", "ISORUN_SUBMITTED_AT=7"))["ISORUN_SUBMITTED_AT"] == "7"


def test_ids_work_as_file_names():
    assert slug("a b/c:d") == "a-b-c-d"
    assert slug("//") == "run"
    assert len({new_run_id("x") for _ in range(100)}) == 100


def test_train_uses_the_given_group(tmp_path, monkeypatch):
    """All runs of a name have the same group, in every attempt."""
    monkeypatch.setenv("WANDB_RUN_GROUP", "paper")
    monkeypatch.setenv("ISORUN_RUN_ID", "run-1")
    run("fit", tmp_path, "length.steps=6", "track.wandb=offline")
    data = next((tmp_path / "wandb").glob("offline-run-*/run-*.wandb")).read_bytes()
    assert b"paper" in data
    assert json.loads((tmp_path / "run.json").read_text())["id"] == "run-1"
