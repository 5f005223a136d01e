"""What an attempt records about where it runs."""

import platform

import torch

from train.setup.environment import environment, image
from train.setup.facts import of_record

DIGEST = "registry.example/isorun@sha256:" + "0" * 64


def test_the_versions_are_recorded():
    found = environment(torch.device("cpu"))
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert {"accelerate", "numpy", "system"} <= found.keys()
    assert "cuda" not in found


def test_the_image_is_the_one_that_the_launcher_tells():
    assert image({"ISORUN_IMAGE": f" {DIGEST}\n"}) == DIGEST
    assert image({"APPTAINER_CONTAINER": "/images/isorun.sif"}) == "/images/isorun.sif"
    assert image({"ISORUN_IMAGE": " ", "SINGULARITY_CONTAINER": "a.sif"}) == "a.sif"
    assert image({}) is None
    assert image({"ISORUN_IMAGE": "a\x1b[31m"}) is None
    assert image({"ISORUN_IMAGE": "https://me:hunter2@host/x"}) == "https://me:***@host/x"


def test_the_facts_of_an_earlier_attempt_are_those_of_its_record():
    record = {
        "attempt": 1, "world_size": 2, "hosts": ["a"], "image": DIGEST, "code": {"commit": "abc"},
        "ended": {"code": 75, "reason": "lost"}, "seed": 0,
    }  # fmt: skip
    assert of_record(record) == {
        "placement": {"world_size": 2, "hosts": ["a"]},
        "image": DIGEST,
        "code": {"commit": "abc"},
        "ended": {"code": 75, "reason": "lost"},
    }
    assert of_record({}) == {"placement": {}}
