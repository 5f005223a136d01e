"""`kubectl kustomize` of an overlay and TorchX's rendering of the same run give equal objects."""

import difflib
import math

import pytest
import yaml

from launch.kubernetes.scheduler import create_scheduler
from launch.kubernetes.values import number
from launch.torchx.components import fit, run
from tests.launch.kubernetes.objects import K8S, OVERLAYS, built, unresolved
from tests.support.lanes import thinned

# Expected differences: names, which are new for each launch; the role label, which TorchX needs;
# and the identity of the run, which a launcher sets and manifests leave to the run directory.
IDENTITY = {"ISORUN_RUN_ID", "WANDB_RUN_ID", "WANDB_RUN_GROUP", "WANDB_JOB_TYPE"}


def spec_of(overlay):
    return yaml.safe_load((K8S / "overlays" / overlay / "run.yaml").read_text())["spec"]


def cfg_of(overlay):
    """Options that only the scheduler has: TorchX counts whole cores."""
    cpu = spec_of(overlay)["cpu"]
    return {"cpu": cpu} if number(cpu) % 1 else {}


def app_of(overlay):
    """The same run as a TorchX app."""
    spec = spec_of(overlay)
    nodes = f"{spec['minNodes']}:{spec['nodes']}" if "minNodes" in spec else spec["nodes"]
    words = {
        "j": f"{nodes}x{spec['processes']}",
        "gpu": spec.get("gpus", 0),
        "cpu": math.ceil(number(spec["cpu"])),
        "memMB": int(number(spec["memory"]) / 2**20),
        "image": spec["image"],
        "max_retries": spec["retries"],
    }
    if overlay == "sweep":  # its pods are numbered trials of any command
        from torchx.specs import macros

        app = run(*spec["command"][:-1], preflight="auto", **words)
        app.roles[0].args.append(f"/trials/{macros.replica_id}.yaml")
        return app
    assert spec["command"][:5] == ["python", "-m", "train", "fit", "--config"]
    return fit(*spec["command"][6:], config=[spec["command"][5]], **words)


def plain(objects, name):
    """Removes the expected differences and the order of variables, which do not refer to later
    ones."""
    made = _renamed(sorted(objects, key=lambda o: (o["kind"], o["metadata"]["name"])), name)
    for item in made:
        item["metadata"].pop("namespace", None)
        item["metadata"].get("labels", {}).pop("isorun/role", None)
        _walk(item)
    return made


def _renamed(values, name):
    if isinstance(values, dict):
        return {key: _renamed(inner, name) for key, inner in values.items()}
    if isinstance(values, list):
        return [_renamed(inner, name) for inner in values]
    return "NAME" if values == name else values


def _walk(values):
    if isinstance(values, dict):
        if isinstance(values.get("env"), list):
            kept = [e for e in values["env"] if e["name"] not in IDENTITY]
            assert not unresolved(values)
            values["env"] = sorted(kept, key=lambda e: e["name"])
        for inner in values.values():
            _walk(inner)
    elif isinstance(values, list):
        for inner in values:
            _walk(inner)


def difference(left, right):
    """A unified diff."""
    lines = [yaml.safe_dump_all(o, sort_keys=True).splitlines() for o in (left, right)]
    return "\n".join(difflib.unified_diff(*lines, "kubectl kustomize", "TorchX", lineterm=""))


def same(overlay, rendered, name):
    (run_name,) = {
        o["metadata"]["labels"]["app.kubernetes.io/instance"]
        for o in built(overlay)
        if "app.kubernetes.io/instance" in o["metadata"].get("labels", {})
    }
    left, right = plain(built(overlay), run_name), plain(rendered, name)
    return difference(left, right)


@pytest.mark.parametrize("overlay", thinned(OVERLAYS, kept=["multi-node", "trainjob", "sweep"]))
def test_kustomize_and_torchx_give_equal_objects(overlay, monkeypatch):
    monkeypatch.chdir(K8S.parent)  # contains configs/
    scheduler = create_scheduler("test")
    cfg = {"overlay": overlay, "namespace": "ml", **cfg_of(overlay)}
    info = scheduler.submit_dryrun(app_of(overlay), cfg)
    difference = same(overlay, info.request.rendered.objects, info.request.name)
    assert not difference, difference
    assert str(info)  # printed by `torchx run --dryrun`
    assert list(yaml.safe_load_all(str(info))) == info.request.rendered.objects


def test_a_difference_is_detected():
    objects = built("cpu-demo")
    job = next(o for o in objects if o["kind"] == "Job")
    job["spec"]["template"]["spec"]["containers"][0]["env"][4]["value"] = "3"
    job["spec"]["ttlSecondsAfterFinished"] = 60
    difference = same("cpu-demo", objects, "text")
    assert "-  ttlSecondsAfterFinished: 86400\n+  ttlSecondsAfterFinished: 60" in difference
    assert "+          value: '3'" in difference
