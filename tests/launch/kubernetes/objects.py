"""The objects of the overlays as kustomize builds them, and functions that examine them."""

import copy
import functools
import os
import re
import subprocess

import yaml

from launch.kubernetes import manifests
from launch.kubernetes.rendering import RenderRequest, render
from launch.kubernetes.values import parse
from tests.support.kubectl import kubectl
from tests.support.runs import ROOT

K8S = ROOT / "k8s"
OVERLAYS = sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml"))
COMPONENTS = sorted(path.parent.name for path in K8S.glob("components/*/kustomization.yaml"))
# Values that components require and no overlay sets; each component is rendered with an overlay.
VALUES = {
    "queue": "training", "queuePriority": "research", "topology": "example.com/rack",
    "priorityClass": "research", "efaDevices": "4", "minNodes": "1", "trials": "3",
    "parallel": "2", "gpus": "1", "timeLimit": "86400",
}  # fmt: skip


@functools.cache
def _built(folder):
    done = subprocess.run(
        [kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def built(overlay):
    """The output of `kubectl kustomize` for an overlay."""
    return copy.deepcopy(_built(K8S / "overlays" / overlay))


# Components that need a certain overlay.
OVERLAY_FOR = {"sweep": "sweep", "independent": "sweep"}


def wanted(component):
    """The values that a component requires and no overlay sets."""
    return sorted(manifests.needs(component) & VALUES.keys() - {"trials", "parallel"})


@functools.cache
def _with_component(component):
    values = parse([f"{k}={VALUES[k]}" for k in wanted(component)])
    overlay = OVERLAY_FOR.get(component, "cpu-demo")
    return render(RenderRequest(overlay, values, [component])).objects


def with_component(component):
    """The objects of an overlay with a component, as `isorun render` builds them."""
    return copy.deepcopy(_with_component(component))


def one(objects, kind, api="batch/v1"):
    """The only object of a kind."""
    (found,) = [
        o for o in objects if o["kind"] == kind and (kind != "Job" or o["apiVersion"] == api)
    ]
    return found


def templates(values):
    """Every pod template in an object, at any depth."""
    if isinstance(values, dict):
        if "containers" in values.get("spec", {}):
            return [values]
        return [found for inner in values.values() for found in templates(inner)]
    if isinstance(values, list):
        return [found for inner in values for found in templates(inner)]
    return []


def environment_with_kubectl():
    """An environment for commands that search for kubectl themselves."""
    return {**os.environ, "ISORUN_KUSTOMIZE": kubectl()}


def main_container(template):
    return template["spec"]["containers"][0]


def references(text):
    """The variables that Kubernetes would substitute in a text."""
    return re.findall(r"(?<!\$)\$\((\w+)\)", text)


def unresolved(container):
    """References in variables to others that do not come before them, which stay as they are."""
    known, found = set(), []
    for item in container["env"]:
        found += [name for name in references(item.get("value", "")) if name not in known]
        known.add(item["name"])
    return found


def variables(container):
    return {item["name"]: item.get("value") for item in container.get("env", [])}
