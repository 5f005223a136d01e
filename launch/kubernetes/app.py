"""A TorchX app as a request for rendering: what it says becomes values of run.yaml, where there is
one for it, and a patch of the Job where there is none."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from launch.contract import UsageError
from launch.kubernetes import manifests
from launch.kubernetes.rendering import Request
from launch.kubernetes.values import Change, Changes, number

if TYPE_CHECKING:
    from torchx.specs import AppDef, Role

ROLE = "isorun/role"  # the label that says which TorchX role a job is
_AGENT = ["python", "-m", "launch.agent"]
_HEAD = "ISORUN_HEAD"  # the variable that holds node 0's host, for apps that ask for it
_INDEX = "\N{REPLACEMENT CHARACTER}index\N{REPLACEMENT CHARACTER}"  # stands in no argument
# What the templates say themselves, as it depends on where the pods are.
_BY_TEMPLATE = {"rdzv_endpoint", "rdzv_host_env", "node_rank", "local_addr"}
# Options of the scheduler that are values of a run.
_VALUES = {
    "cpu": "cpu",
    "queue": "queue",
    "queue_priority": "queuePriority",
    "topology": "topology",
    "priority_class": "priorityClass",
    "shared_memory": "sharedMemory",
    "scratch": "scratch",
}
# Those that some component puts in place: naming one is asking for the component.
_COMPONENTS = {
    "queue_priority": "kueue",
    "topology": "kueue-topology",
    "priority_class": "priority",
}


@dataclass
class _Job:
    """What a role comes to."""

    command: list[str]
    spec: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    """Of the agent's, those that take no value."""
    add: list[str] = field(default_factory=list)
    patches: list[dict[str, Any]] = field(default_factory=list)


def unique_name(name: str) -> str:
    """A name that no other launch has, short enough for pods to be numbered."""
    return f"{name[:40].rstrip('-')}-{secrets.token_hex(3)}"


def request(app: AppDef, cfg: Mapping[str, Any], name: str) -> Request:
    """What is to be rendered for an app. ``cfg`` are the scheduler's options, ``name`` the job's.
    Raises UsageError."""
    if len(app.roles) != 1:
        raise UsageError(
            f"The app {app.name} has {len(app.roles)} roles, but kubernetes_job makes one job of "
            "one role; start them one by one, or use TorchX's scheduler kubernetes."
        )
    overlay = manifests.overlay(str(cfg["overlay"]))
    role = _substituted(app.roles[0], f"{cfg['namespace']}:{name}")
    job = _agent_job(role) if _words(role)[: len(_AGENT)] == _AGENT else _plain_job(role)
    _resources(job, role, overlay, cfg)
    _mounts(job, role)
    job.env = {**role.env, **job.env}
    changes = Changes(
        spec={key: Change(value, f"the app {app.name}") for key, value in job.spec.items()},
        name=Change(name, "TorchX"),
        env=job.env,
        namespace=str(cfg["namespace"]),
        stop_deadline=(
            Change(cfg["stop_deadline"], "-cfg stop_deadline") if cfg.get("stop_deadline") else None
        ),
    )
    metadata = {"labels": {ROLE: role.name}, "annotations": dict(app.metadata) or None}
    job.patches.append({"metadata": metadata})
    if job.flags:
        # Before the -- that ends the agent's own arguments in the template.
        place = "/spec/template/spec/containers/0/command/7"
        operations = [{"op": "add", "path": place, "value": flag} for flag in job.flags]
        job.patches.append({"operations": operations})
    add = [*job.add, *(cfg.get("components") or [])]
    leave_out = [] if role.resource.gpu > 0 else ["gpu"]
    if any(_is_runs(mount.dst_path) for mount in role.mounts):
        leave_out.append("pvc")  # nobody would use that claim
    return Request(overlay.name, changes, add, leave_out, job.patches)


def _words(role: Role) -> list[str]:
    return [role.entrypoint, *role.args]


def _substituted(role: Role, app_id: str) -> Role:
    """The role with TorchX's macros replaced. ``$(...)`` is Kubernetes' own way to name variables,
    which the node's number makes use of and which is otherwise to be taken literally."""
    from torchx.specs import macros

    values = macros.Values(img_root="/app", app_id=app_id, replica_id=_INDEX, rank0_env=_HEAD)
    made = values.apply(role)

    def literal(text: str) -> str:
        return text.replace("$(", "$$(").replace(_INDEX, "$(JOB_COMPLETION_INDEX)")

    made.args = [literal(word) for word in made.args]
    made.env = {key: literal(value) for key, value in made.env.items()}
    return made


def _agent_job(role: Role) -> _Job:
    """The agent is started by the template; its options become the template's values."""
    from launch.agent.arguments import parser

    words = role.args[len(_AGENT) - 1 :]
    at = words.index("--") if "--" in words else len(words)
    job = _Job(command=words[at + 1 :])
    for key, value in vars(parser().parse_args(words[:at])).items():
        if value is None or value is False or key in _BY_TEMPLATE:
            continue
        if value is True:
            job.flags.append(f"--{key.replace('_', '-')}")
        elif key == "nnodes":
            least, _, most = str(value).partition(":")
            if most:
                job.add.append("elastic")
                job.spec["minNodes"] = int(least)
        elif key == "nproc_per_node":
            job.spec["processes"] = int(value) if str(value).isdigit() else value
        else:
            job.env[f"PET_{key.upper()}"] = str(value)
    job.spec["command"] = job.command
    return job


def _plain_job(role: Role) -> _Job:
    """An app that is not run by the agent, such as a sweep. If no node asks for another's address,
    they do not need each other."""
    job = _Job(command=_words(role), spec={"processes": 1, "command": _words(role)})
    asks = any(_HEAD in text for text in (*role.args, *role.env.values()))
    if asks:
        # Last in the list: a variable sees those above it.
        head = {"name": _HEAD, "value": "$(JOB_NAME)-0.$(SERVICE)"}
        place = "/spec/template/spec/containers/0/env/-"
        job.patches.append({"operations": [{"op": "add", "path": place, "value": head}]})
    else:
        job.add.append("independent")
    container = {"name": "train", "command": ["tini", "--"]}
    job.patches.append({"spec": {"template": {"spec": {"containers": [container]}}}})
    return job


def _resources(job: _Job, role: Role, overlay: manifests.Overlay, cfg: Mapping[str, Any]) -> None:
    resource = role.resource
    if resource.cpu <= 0 or resource.memMB <= 0:
        raise UsageError(
            f"The role {role.name} does not say how many cores and how much memory it needs; give "
            "it a resource, such as -h cpu_small."
        )
    job.spec |= {
        "image": role.image,
        "nodes": role.num_replicas,
        "retries": role.max_retries,
        "cpu": f"{resource.cpu:g}",
        "memory": _mebibytes(resource.memMB),
    }
    if resource.gpu > 0:
        job.spec["gpus"] = resource.gpu
        job.add.append("gpu")
    for option, key in _VALUES.items():
        if cfg.get(option):
            job.spec[key] = cfg[option]
            job.add += [_COMPONENTS[option]] if option in _COMPONENTS else []
    shared = job.spec.get("sharedMemory") or overlay.run["spec"]["sharedMemory"]
    half = resource.memMB // 2
    if "sharedMemory" not in job.spec and number(shared) > half * 2**20:
        job.spec["sharedMemory"] = _mebibytes(half)  # what the overlay says is for larger nodes
    pod: dict[str, Any] = {}
    selector = {k: str(v) for k, v in resource.capabilities.items() if "/" in k}
    if selector:
        pod["nodeSelector"] = selector
    if resource.devices:
        devices = dict(resource.devices)
        limits = {"requests": devices, "limits": devices}
        pod["containers"] = [{"name": "train", "resources": limits}]
    if pod:
        job.patches.append({"spec": {"template": {"spec": pod}}})


def _mebibytes(count: int) -> str:
    return f"{count // 1024}Gi" if count % 1024 == 0 else f"{count}Mi"


def _mounts(job: _Job, role: Role) -> None:
    volumes: list[dict[str, Any]] = []
    mounts: list[dict[str, Any]] = []
    for at, mount in enumerate(role.mounts):
        name = f"mount-{at}"
        if _is_runs(mount.dst_path):
            name = "runs"  # in place of the template's
        kind = type(mount).__name__
        if kind == "VolumeMount":
            claim = {"claimName": mount.src, "readOnly": mount.read_only}
            volume: dict[str, Any] = {
                "persistentVolumeClaim": {k: v for k, v in claim.items() if v}
            }
        elif kind == "BindMount":
            volume = {"hostPath": {"path": mount.src_path}}
        else:
            raise UsageError(
                f"The device {mount.src_path} cannot be mounted into a pod that may not do as it "
                "likes; use the device plug-in of the cluster, and name its resource under "
                "`devices` of a named resource."
            )
        if name == "runs":
            rest: dict[str, Any] = {
                "emptyDir": None,
                "persistentVolumeClaim": None,
                "hostPath": None,
            }
            volume = {**{k: v for k, v in rest.items() if k not in volume}, **volume}
        else:
            mounts.append({"name": name, "mountPath": mount.dst_path})
            mounts[-1] |= {"readOnly": True} if mount.read_only else {}
        volumes.append({"name": name, **volume})
    if volumes:
        container = {"name": "train", "volumeMounts": mounts}
        pod = {"volumes": volumes, "containers": [container]}
        job.patches.append({"spec": {"template": {"spec": pod}}})


def _is_runs(path: str) -> bool:
    return path.rstrip("/") == "/runs"


def is_name(text: str) -> bool:
    """Whether a namespace may be called this."""
    return re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", text) is not None
