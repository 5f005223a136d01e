"""checkov finds nothing that k8s/.checkov.yaml does not answer."""

import json
import subprocess
import sys

import pytest
import yaml

from tests.launch.kubernetes.objects import COMPONENTS, K8S, OVERLAYS, VALUES, built, templates
from tests.launch.kubernetes.test_schemas import OVERLAY_FOR, wanted
from tests.support.kubectl import cache

VERSION = "3.3.30"
# Said of components that say so themselves.
LOOSENED = {"rdma-ib": {"CKV_K8S_25"}}


@pytest.fixture(scope="module")
def checkov():
    """The program, in an environment of its own, as its pins are no others'."""
    home = cache() / f"checkov-{VERSION}"
    program = home / "bin" / "checkov"
    if not program.exists():
        try:
            for words in (["-m", "venv", "--clear", str(home)],):
                subprocess.run([sys.executable, *words], check=True, timeout=300)
            pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet"]
            subprocess.run([*pip, f"checkov=={VERSION}"], check=True, timeout=1200)
        except (subprocess.SubprocessError, OSError) as error:
            pytest.skip(f"checkov {VERSION} cannot be installed: {error}")
    return str(program)


def plain(objects):
    """Kinds that checkov does not know, as Jobs with the same pods."""
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


def findings(checkov, folder):
    done = subprocess.run(
        [checkov, "-d", str(folder), "--framework", "kubernetes", "--config-file",
         str(K8S / ".checkov.yaml"), "-o", "json", "--quiet"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["resource_count"] > 0
    return {
        (f["file_path"].strip("/"), f["check_id"], f["resource"])
        for f in report["results"]["failed_checks"]
    }


@pytest.mark.slow
def test_checkov_has_no_unanswered_findings(checkov, tmp_path):
    from launch.kubernetes.rendering import Request, render
    from launch.kubernetes.values import parse

    made = {f"overlay-{name}": built(name) for name in OVERLAYS}
    for name in COMPONENTS:
        values = parse([f"{k}={VALUES[k]}" for k in wanted(name)])
        request = Request(OVERLAY_FOR.get(name, "cpu-demo"), values, [name])
        made[f"component-{name}"] = render(request).objects
    for name, objects in made.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(plain(objects)))
    answered = {
        (f"component-{n}.yaml", check) for n, checks in LOOSENED.items() for check in checks
    }
    found = findings(checkov, tmp_path)
    assert {f for f in found if f[:2] not in answered} == set()
    assert answered <= {f[:2] for f in found}, "nothing is answered that is not found"
    # It does look: a pod as root, with all its rights.
    job = next(o for o in built("cpu-demo") if o["kind"] == "Job")
    template = job["spec"]["template"]["spec"]
    template["containers"][0]["securityContext"] = {"privileged": True}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(job))
    assert {"CKV_K8S_16", "CKV_K8S_20"} <= {
        c for file, c, _ in findings(checkov, tmp_path) if file == "bad.yaml"
    }
