"""Renders an overlay, with the changes of a launch, to the objects for a cluster.

The templates are copied, the two files of the overlay are written again with the changes, and
kustomize does the rest. They are written as JSON, where every text has quotation marks: kustomize
reads another version of YAML than PyYAML writes, in which 1e3 is a number. The result
equals `kubectl kustomize` of an overlay with the same content.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from launch import deadlines
from launch.agent_command import variable
from launch.contract import STOP_DEADLINE, UsageError
from launch.kubernetes import checks, kustomize, manifests, rules
from launch.kubernetes.values import Changes, apply

Object = dict[str, Any]
_POD_INDEX = "JOB_COMPLETION_INDEX"
_JOB = {"group": "batch", "kind": "Job"}
# Components that change what ``run`` has set, in the order in which they are applied.
_AFTER_RUN = (manifests.RUN, "elastic", "independent", "sweep", "openshift")
# Components that need a plain Job: the other kinds of objects schedule and restart a gang.
_NO_GANG = {
    "elastic": "lets pods join and leave",
    "independent": "lets pods fail independently",
    "sweep": "runs only some of its pods at a time",
}


@dataclass(frozen=True)
class RenderRequest:
    """The input of a rendering."""

    overlay: str
    changes: Changes = field(default_factory=Changes)
    add: Sequence[str] = ()
    """Components in addition to the overlay's."""
    leave_out: Sequence[str] = ()
    """Components of the overlay to leave out."""
    patches: Sequence[Mapping[str, Any]] = ()
    """Strategic merge patches of the Job, or ``{"operations": [...]}`` with JSON patches."""


@dataclass(frozen=True)
class Rendered:
    """The objects, and warnings for the user."""

    objects: list[Object]
    warnings: list[str]

    @property
    def workload(self) -> Object:
        """The Job, JobSet or TrainJob."""
        return next(o for o in self.objects if o["kind"] in checks.WORKLOADS)


def render(request: RenderRequest) -> Rendered:
    """The final objects, checked. Raises UsageError."""
    overlay = manifests.overlay(request.overlay)
    components = _components(overlay, request.add, request.leave_out)
    wanted = {key for component in components for key in manifests.needs(component)}
    run = apply(overlay.run, request.changes, wanted, overlay.name)
    checks.name(run["metadata"]["name"], request.changes.name)
    if request.changes.namespace is not None:
        checks.namespace(request.changes.namespace)
    checks.environment(request.changes.env)
    spec = run["spec"]
    if "trials" in spec:
        _check_trials(overlay, spec, request.changes)
    processes = spec["processes"] if isinstance(spec["processes"], int) else 1
    deadline = checks.training(spec["command"], spec["nodes"] * processes)
    with tempfile.TemporaryDirectory(prefix="isorun-k8s-") as folder:
        copy = Path(folder) / "k8s"
        shutil.copytree(manifests.root(), copy)
        target = copy / "overlays" / overlay.name
        kustomization = _kustomization(overlay, components, request)
        (target / "run.yaml").write_text(json.dumps(run), encoding="utf-8")
        _write_changes(copy / "components" / "changes", request)
        (target / "kustomization.yaml").write_text(json.dumps(kustomization), encoding="utf-8")
        objects = kustomize.build(target)
    return Rendered(objects, checks.check(objects, deadline))


def as_yaml(objects: Sequence[Object]) -> str:
    """The objects as one YAML text, as kubectl reads it."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=True, default_flow_style=False)


class _Dumper(yaml.SafeDumper):
    """Quotes text that only kubectl would read as a number, such as 1e3."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        """A text."""
        style = '"' if re.match(r"[-+.]?\d", text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_str)


def _components(
    overlay: manifests.Overlay, add: Sequence[str], leave_out: Sequence[str]
) -> list[str]:
    """The overlay's and the added components in order: those before ``run``, ``run`` and those
    after it, and last the one that converts the Job to another kind."""
    added = [manifests.check("components", name) for name in add]
    gone = set(leave_out)
    if gone & set(manifests.CLAIMS) or set(added) & set(manifests.CLAIMS):
        gone |= set(manifests.CLAIMS)
    kept = [name for name in overlay.components if name not in gone]
    both = list(dict.fromkeys([*kept, *added]))
    if len(claims := [name for name in both if name in manifests.CLAIMS]) > 1:
        raise UsageError(
            f"The components {' and '.join(claims)} cannot be combined: each is the volume with "
            "the runs; choose one."
        )
    conversions = [name for name in both if manifests.converts(name)]
    if len(conversions) > 1:
        raise UsageError(
            f"The components {' and '.join(conversions)} cannot be combined: each converts the Job "
            "to another kind; choose one."
        )
    for name in both:
        if conversions and name in _NO_GANG:
            raise UsageError(
                f"The components {name} and {conversions[0]} cannot be combined: {name} "
                f"{_NO_GANG[name]}, and {conversions[0]} starts and restarts all pods together; "
                "remove one of them, or use an overlay with a plain Job, such as multi-node."
            )
    if "volcano" in conversions and "time-limit" in both:
        raise UsageError(
            "The components time-limit and volcano cannot be combined: a Volcano job has no time "
            "limit, and counts each of its restarts; remove time-limit, and set retries."
        )
    late = sorted((n for n in both if n in _AFTER_RUN), key=_AFTER_RUN.index)
    early = [n for n in both if n not in late and n not in conversions]
    return [*early, *late, *conversions]


def _check_trials(overlay: manifests.Overlay, spec: Mapping[str, Any], changes: Changes) -> None:
    """Each pod of a sweep needs a file of its own, and is a node of its own."""
    if spec["nodes"] != 1:
        raise UsageError(
            f"nodes is {spec['nodes']} ({changes.origin('nodes', overlay.name)}), but each trial "
            "of a sweep has one node; set parallel to the number of trials that run at a time, or "
            "render the trials one by one."
        )
    files = overlay.files("trials")
    missing = [f"{n}.yaml" for n in range(spec["trials"]) if f"{n}.yaml" not in files]
    if missing:
        named = ", ".join(missing[:3]) + (" ..." if missing[3:] else "")
        raise UsageError(
            f"trials is {spec['trials']} ({changes.origin('trials', overlay.name)}), but the "
            f"overlay {overlay.name} has only {len(files)} trials, and no {named}; add the files "
            "and list them in the overlay's kustomization.yaml, or decrease trials."
        )


def _kustomization(
    overlay: manifests.Overlay, components: Sequence[str], request: RenderRequest
) -> dict[str, Any]:
    at = next((i for i, c in enumerate(components) if manifests.converts(c)), len(components))
    paths = [f"../../components/{c}" for c in (*components[:at], "changes", *components[at:])]
    made = {**overlay.kustomization, "components": paths}
    if "trainjob" in components:  # as in the overlay trainjob: its webhook needs this order
        made["sortOptions"] = manifests.overlay("trainjob").kustomization["sortOptions"]
    if request.changes.namespace:
        made["namespace"] = request.changes.namespace
    return made


def _write_changes(folder: Path, request: RenderRequest) -> None:
    """Writes a component with the changes that are not values of run.yaml."""
    patches = [*map(dict, request.patches)]
    container: dict[str, Any] = {"name": "train"}
    env = dict(request.changes.env)
    pod: dict[str, Any] = {"containers": [container]}
    if change := request.changes.stop_deadline:
        seconds = checks.seconds(change.value, f"stopDeadline ({change.origin})")
        timeout = seconds + deadlines.POD_AGENT_AFTER_RANKS
        env |= {STOP_DEADLINE: str(seconds), variable("shutdown-timeout"): str(timeout)}
        pod["terminationGracePeriodSeconds"] = timeout + deadlines.POD_AFTER_AGENT
    if env:
        container["env"] = _env_entries(env)
        patches.insert(0, {"spec": {"template": {"spec": pod}}})
    folder.mkdir()
    made = {
        "apiVersion": "kustomize.config.k8s.io/v1alpha1",
        "kind": "Component",
        "patches": [{"target": _JOB, "patch": _patch(patch)} for patch in patches],
    }
    (folder / "kustomization.yaml").write_text(json.dumps(made), encoding="utf-8")


def _env_entries(env: Mapping[str, str]) -> list[dict[str, Any]]:
    """The variables of a container. A value may refer only to variables before it, and the Job
    controller appends the pod's index, unless there is one."""
    entries: list[dict[str, Any]] = [{"name": k, "value": v} for k, v in env.items()]
    if any(f"$({_POD_INDEX})" in value.replace("$$", "") for value in env.values()):
        field = {"fieldPath": f"metadata.annotations['{rules.INDEX}']"}
        entries.insert(0, {"name": _POD_INDEX, "valueFrom": {"fieldRef": field}})
    return entries


def _patch(patch: Mapping[str, Any]) -> str:
    if "operations" in patch:
        return json.dumps(patch["operations"])
    metadata = {**patch.get("metadata", {}), "name": "run"}
    return json.dumps({"apiVersion": "batch/v1", "kind": "Job", **patch, "metadata": metadata})
