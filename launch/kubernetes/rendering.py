"""From an overlay, and what a launch changes in it, to the objects that a cluster is given.

The templates are copied, the overlay's two files are written anew with the changes in them, and
kustomize does the rest: what comes out is what `kubectl kustomize` would make of an overlay in
which somebody had written the same.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from launch import deadlines
from launch.contract import UsageError
from launch.kubernetes import checks, kustomize, manifests
from launch.kubernetes.values import Changes, apply

Object = dict[str, Any]
_JOB = {"group": "batch", "kind": "Job"}
# These change what ``run`` has put in place, in this order.
_LATE = (manifests.RUN, "elastic", "independent", "sweep", "openshift")
# These make more of a plain Job than a gang, which is all that the other kinds of objects are.
_NO_GANG = {
    "elastic": "lets pods come and go",
    "independent": "lets pods fail one by one",
    "sweep": "runs a few pods of many at a time",
}


@dataclass(frozen=True)
class Request:
    """All that makes up a rendering."""

    overlay: str
    changes: Changes = field(default_factory=Changes)
    add: Sequence[str] = ()
    """Further components."""
    leave_out: Sequence[str] = ()
    patches: Sequence[Mapping[str, Any]] = ()
    """Of the Job, as kustomize takes them: ``{"patch": ...}``; a mapping is merged, a list is of
    single operations."""


@dataclass(frozen=True)
class Rendered:
    """The objects, and what their user should know."""

    objects: list[Object]
    warnings: list[str]

    @property
    def workload(self) -> Object:
        """The Job or what stands in its place."""
        return next(o for o in self.objects if o["kind"] in checks.WORKLOADS)


def render(request: Request) -> Rendered:
    """The final objects, looked over. Raises UsageError with what is wrong."""
    overlay = manifests.overlay(request.overlay)
    components = _components(overlay, request.add, request.leave_out)
    wanted = {key for component in components for key in manifests.needs(component)}
    run = apply(overlay.run, request.changes, wanted, overlay.name)
    checks.name(run["metadata"]["name"])
    spec = run["spec"]
    if "trials" in spec:
        _trials(overlay, spec, request.changes)
    processes = spec["processes"] if isinstance(spec["processes"], int) else 1
    deadline = checks.training(spec["command"], spec["nodes"] * processes)
    with tempfile.TemporaryDirectory(prefix="isorun-k8s-") as folder:
        copy = Path(folder) / "k8s"
        shutil.copytree(manifests.root(), copy)
        here = copy / "overlays" / overlay.name
        kustomization = _kustomization(overlay, components, request)
        (here / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
        _changes(copy / "components" / "changes", request)
        (here / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), encoding="utf-8")
        objects = kustomize.build(here)
    return Rendered(objects, checks.check(objects, deadline))


def as_yaml(objects: Sequence[Object]) -> str:
    """As kubectl reads and writes them."""
    return yaml.safe_dump_all(objects, sort_keys=True, default_flow_style=False)


def _components(
    overlay: manifests.Overlay, add: Sequence[str], leave_out: Sequence[str]
) -> list[str]:
    """Those of the overlay and those that are added: before ``run``, after it, and last the one
    that turns the Job into something else."""
    kept = [name for name in overlay.components if name not in leave_out]
    added = [manifests.check("components", name) for name in add]
    both = list(dict.fromkeys([*kept, *added]))
    conversions = [name for name in both if manifests.converts(name)]
    if len(conversions) > 1:
        raise UsageError(
            f"{' and '.join(conversions)} do not go together: each makes another kind of object "
            "of the run; choose one."
        )
    for name in both:
        if conversions and name in _NO_GANG:
            raise UsageError(
                f"{name} and {conversions[0]} do not go together: {name} {_NO_GANG[name]}, which a "
                f"plain Job can do, and what {conversions[0]} makes starts, fails and ends as one; "
                "leave one of the two out, or take an overlay that makes a Job, such as multi-node."
            )
    late = sorted((n for n in both if n in _LATE), key=_LATE.index)
    early = [n for n in both if n not in late and n not in conversions]
    return [*early, *late, *conversions]


def _trials(overlay: manifests.Overlay, spec: Mapping[str, Any], changes: Changes) -> None:
    """That there is a file for each pod of a sweep, and that it does not ask for further pods."""
    if spec["nodes"] != 1:
        raise UsageError(
            f"nodes is {spec['nodes']} ({changes.origin('nodes', overlay.name)}), but each trial "
            "of a sweep has one node; say how many run at a time by parallel, or render the trials "
            "one by one."
        )
    there = overlay.files("trials")
    missing = [f"{n}.yaml" for n in range(spec["trials"]) if f"{n}.yaml" not in there]
    if missing:
        named = ", ".join(missing[:3]) + (" ..." if missing[3:] else "")
        raise UsageError(
            f"trials is {spec['trials']} ({changes.origin('trials', overlay.name)}), but the "
            f"overlay {overlay.name} has no {named} among its trials; write what is missing and "
            "name it in the overlay's kustomization.yaml, or make trials smaller: it has "
            f"{len(there)}."
        )


def _kustomization(
    overlay: manifests.Overlay, components: Sequence[str], request: Request
) -> dict[str, Any]:
    at = next((i for i, c in enumerate(components) if manifests.converts(c)), len(components))
    paths = [f"../../components/{c}" for c in (*components[:at], "changes", *components[at:])]
    made = {**overlay.kustomization, "components": paths}
    if "pvc" in request.leave_out:  # the claim, which an overlay may patch, is not there
        made.pop("patches", None)
    if request.changes.namespace:
        made["namespace"] = request.changes.namespace
    return made


def _changes(folder: Path, request: Request) -> None:
    """A component for what no value of run.yaml can say."""
    patches = [*map(dict, request.patches)]
    container: dict[str, Any] = {"name": "train"}
    env = dict(request.changes.env)
    pod: dict[str, Any] = {"containers": [container]}
    if change := request.changes.stop_deadline:
        seconds = checks.seconds(change.value, f"stopDeadline ({change.origin})")
        agent = seconds + deadlines.POD_AGENT_AFTER_RANKS
        env |= {"ISORUN_STOP_DEADLINE": str(seconds), "PET_SHUTDOWN_TIMEOUT": str(agent)}
        pod["terminationGracePeriodSeconds"] = agent + deadlines.POD_AFTER_AGENT
    if env:
        container["env"] = [{"name": k, "value": v} for k, v in env.items()]
        patches.insert(0, {"spec": {"template": {"spec": pod}}})
    folder.mkdir()
    made = {
        "apiVersion": "kustomize.config.k8s.io/v1alpha1",
        "kind": "Component",
        "patches": [{"target": _JOB, "patch": _patch(patch)} for patch in patches],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(made), encoding="utf-8")


def _patch(patch: Mapping[str, Any]) -> str:
    if "operations" in patch:
        return yaml.safe_dump(patch["operations"])
    metadata = {**patch.get("metadata", {}), "name": "run"}
    return yaml.safe_dump({"apiVersion": "batch/v1", "kind": "Job", **patch, "metadata": metadata})
