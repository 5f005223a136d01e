"""Every object matches its schema: of Kubernetes, in several versions, or of a CRD."""

import functools
import json

import jsonschema
import kubernetes_validate
import pytest
from kubernetes_validate import utils
from packaging.version import Version

from tests.launch.kubernetes.objects import (
    COMPONENTS,
    K8S,
    OVERLAYS,
    _built,
    built,
    one,
    templates,
    with_component,
)
from tests.support.runs import ROOT

# It reads megabytes again for each object.
utils.schema_contents = functools.cache(utils.schema_contents)
OLDEST = Version("1.31")
VERSIONS = [v for v in utils.all_versions() if Version(v) >= OLDEST]
DATA = ROOT / "tests" / "data" / "kubernetes"
pytestmark = pytest.mark.xdist_group("kubernetes objects")  # which they build once


def crds():
    found = {}
    for path in sorted(DATA.glob("*.json")):
        schema = json.loads(path.read_text())
        properties = schema["properties"]
        found[properties["apiVersion"]["const"], properties["kind"]["const"]] = schema
    return found


def problems(made, version):
    """The schema violations of an object, as text."""
    schema = crds().get((made["apiVersion"], made["kind"]))
    found = []
    if schema is None:
        core = [made]
    else:
        found = [f"{e.json_path}: {e.message}" for e in
                 jsonschema.Draft202012Validator(schema).iter_errors(made)]  # fmt: skip
        # Pods and Jobs inside it are core types.
        core = [{"apiVersion": "v1", "kind": "PodTemplate", "template": t} for t in templates(made)]
        core += [
            {"apiVersion": "batch/v1", "kind": "Job", "spec": spec} for spec in job_specs(made)
        ]
    for item in core:
        try:
            kubernetes_validate.validate(item, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{item['kind']} {error.json_path}: {error.message}")
    return found


def job_specs(made):
    spec = made.get("spec", {})
    for place in (spec, spec.get("template", {}).get("spec", {}) if "template" in spec else {}):
        for job in place.get("replicatedJobs", []):
            yield job["template"]["spec"]


def checked(objects, version):
    return {
        f"{o['kind']} {o['metadata']['name']}": p for o in objects if (p := problems(o, version))
    }


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_of_an_overlay_is_valid(overlay, version):
    assert checked(built(overlay), version) == {}


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_has_valid_objects(component):
    objects = with_component(component)
    assert checked(objects, VERSIONS[-1]) == {}
    assert checked(objects, VERSIONS[0]) == {}


def test_the_queues_are_valid():
    made = _built(K8S / "queues")
    assert {o["kind"] for o in made} == {
        "ResourceFlavor", "ClusterQueue", "LocalQueue", "WorkloadPriorityClass"
    }  # fmt: skip
    assert checked(made, VERSIONS[-1]) == {}


def misspell_policy(jobset):
    jobset["spec"]["failurePolicies"] = jobset["spec"].pop("failurePolicy")


def misspell_job(jobset):
    jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["completion"] = 2


def misspell_pod(jobset):
    templates(jobset)[0]["spec"]["subdomains"] = "text"


@pytest.mark.parametrize("misspell", [misspell_policy, misspell_job, misspell_pod])
def test_the_schemas_detect_errors_at_every_depth(misspell):
    jobset = one(built("jobset"), "JobSet")
    assert problems(jobset, VERSIONS[-1]) == []
    misspell(jobset)
    assert "was unexpected" in " ".join(problems(jobset, VERSIONS[-1]))


def test_the_schema_of_volcano_detects_errors():
    vcjob = one(built("volcano"), "Job", "batch.volcano.sh/v1alpha1")
    vcjob["spec"]["policies"][0]["action"] = "RestartAll"
    assert "RestartAll" in " ".join(problems(vcjob, VERSIONS[-1]))


def test_each_crd_schema_names_its_source():
    for path in DATA.glob("*.json"):
        comment = json.loads(path.read_text())["$comment"]
        assert comment.startswith(("Made from", "Written by hand")), path.name
