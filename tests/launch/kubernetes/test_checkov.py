"""checkov reports nothing except what k8s/.checkov.yaml excludes."""

import pytest
import yaml

from tests.launch.kubernetes.objects import (
    COMPONENTS,
    K8S,
    OVERLAYS,
    built,
    templates,
    with_component,
)
from tests.support.policy import checkov

# Findings about components that document them.
LOOSENED = {"rdma-ib": {"CKV_K8S_25"}}


def plain(objects):
    """Replaces kinds that checkov does not know by Jobs with the same pods."""
    for made in objects:
        known = made["apiVersion"].partition("/")[0] in ("v1", "batch", "networking.k8s.io")
        if known:
            yield made
        for number, template in enumerate([] if known else templates(made)):
            name = f"{made['metadata']['name']}-{number}"
            yield {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {"name": name},
                "spec": {"template": template},
            }


def findings(folder):
    found = checkov("-d", folder, "--framework", "kubernetes",
                    "--config-file", K8S / ".checkov.yaml")  # fmt: skip
    assert found["passed"] > 0
    return {(f["file_path"].strip("/"), f["check_id"], f["resource"]) for f in found["failed"]}


@pytest.mark.slow
def test_checkov_reports_nothing(tmp_path):
    made = {f"overlay-{name}": built(name) for name in OVERLAYS}
    made |= {f"component-{name}": with_component(name) for name in COMPONENTS}
    for name, objects in made.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(plain(objects)))
    answered = {
        (f"component-{n}.yaml", check) for n, checks in LOOSENED.items() for check in checks
    }
    found = findings(tmp_path)
    assert {f for f in found if f[:2] not in answered} == set()
    assert answered <= {f[:2] for f in found}, "every exclusion must be needed"
    # The scan detects a privileged pod.
    job = next(o for o in built("cpu-demo") if o["kind"] == "Job")
    template = job["spec"]["template"]["spec"]
    template["containers"][0]["securityContext"] = {"privileged": True}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(job))
    assert {"CKV_K8S_16", "CKV_K8S_20"} <= {
        c for file, c, _ in findings(tmp_path) if file == "bad.yaml"
    }
