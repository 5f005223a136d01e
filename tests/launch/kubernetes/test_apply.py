"""`isorun render OVERLAY --apply`: the objects reach the cluster in one go."""

import pytest
import yaml

from launch.cli import main
from tests.support.kubectl import kubectl
from tests.support.runs import ROOT

UNNOTICED = (
    'Error from server (Invalid): error when creating "STDIN": admission webhook '
    '"validator.trainjob.trainer.kubeflow.org" denied the request: spec.runtimeRef: Invalid value: '
    'TrainingRuntime.trainer.kubeflow.org "text" not found: specified trainingRuntime must be '
    "created before the TrainJob is created"
)
# Refuses the objects of the first requests, one for each file refusal-N.
APPLY = """#!/bin/sh
if [ "$1" != apply ]; then exec {kubectl} "$@"; fi
number=$(ls {folder}/request-* 2>/dev/null | wc -l)
cat > {folder}/request-$number
if [ -e {folder}/refusal-$number ]; then cat {folder}/refusal-$number >&2; exit 1; fi
echo applied
"""


@pytest.fixture(autouse=True)
def _kubectl(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(APPLY.format(kubectl=kubectl(), folder=tmp_path))
    program.chmod(0o755)
    monkeypatch.setenv("ISORUN_KUSTOMIZE", str(program))
    monkeypatch.chdir(ROOT)


def requests(folder):
    files = sorted(folder.glob("request-*"))
    return [[made["kind"] for made in yaml.safe_load_all(file.read_text())] for file in files]


def test_a_trainjob_follows_when_the_trainer_has_noticed_its_runtime(tmp_path, capfd):
    (tmp_path / "refusal-1").write_text(UNNOTICED)
    assert main(["render", "trainjob", "-n", "ml", "--apply"]) == 0
    first, *others = requests(tmp_path)
    assert "TrainingRuntime" in first
    assert "TrainJob" not in first
    assert others == [["TrainJob"], ["TrainJob"]]
    out, err = capfd.readouterr()
    assert out == "applied\n" * 2, "what kubectl says, and no objects"
    assert "error" not in err


def test_other_objects_are_applied_at_once(tmp_path):
    assert main(["render", "cpu-demo", "--apply", "--set", "name=mine"]) == 0
    (kinds,) = requests(tmp_path)
    assert {"Job", "Service", "ServiceAccount"} <= set(kinds)


@pytest.mark.parametrize(
    ("said", "code", "told"),
    [
        (
            'Error from server (NotFound): namespaces "ml" not found',
            64,
            'namespaces "ml" not found',
        ),
        ("Unable to connect to the server: dial tcp: connection refused", 75, "retry later"),
        ("", 75, "kubectl failed without a message"),
    ],
)
def test_a_refusal_is_one_sentence(tmp_path, capsys, said, code, told):
    (tmp_path / "refusal-0").write_text(said)
    assert main(["render", "trainjob", "--apply"]) == code
    assert requests(tmp_path)[1:] == [], "it is not tried again"
    (error,) = [x for x in capsys.readouterr().err.splitlines() if "error:" in x]
    assert error.startswith("isorun: error: The objects could not be applied: kubectl ")
    assert told in error
