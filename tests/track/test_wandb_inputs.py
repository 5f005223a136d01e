"""The artifacts that a run has started from become inputs of its W&B run."""

import logging

from train.track.wandb_inputs import RunInputs


class WandbRun:
    def __init__(self):
        self.used = []

    def use_artifact(self, name):
        if name == "me/p/lost:v0":
            raise ValueError("not found")
        self.used.append(name)


def test_each_artifact_is_declared_and_a_failure_is_a_warning(caplog):
    run = WandbRun()
    with caplog.at_level(logging.WARNING, "train"):
        RunInputs(run, ["me/p/lost:v0", "me/p/base:v1"]).wait(60)
    assert run.used == ["me/p/base:v1"]
    [record] = caplog.records
    assert "does not show me/p/lost:v0 as an input of the run (not found)" in record.getMessage()
