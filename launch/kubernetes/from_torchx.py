"""Converts a TorchX app to a render request: its fields become values of run.yaml, or, if there is
no such value, patches of the Job."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from launch.agent_command import AGENT, agent_arguments, variable
from launch.contract import UsageError, whole_number
from launch.kubernetes import manifests, rules, run_code
from launch.kubernetes.code_carrier import Carrier
from launch.kubernetes.rendering import RenderRequest
from launch.kubernetes.values import TORCHX_OPTIONS, Change, Changes, number

if TYPE_CHECKING:
    from torchx.specs import AppDef, Role

ROLE = "isorun/role"  # the label with the name of the TorchX role
_HEAD = "ISORUN_HEAD"  # the variable with node 0's host name, for apps that use rank0_env
_INDEX = "\N{REPLACEMENT CHARACTER}index\N{REPLACEMENT CHARACTER}"  # occurs in no argument
# Options of the agent that the templates set.
_BY_TEMPLATE = {"rdzv_endpoint", "rdzv_host_env", "node_rank", "local_addr"}
# Options that add the component which needs the value.
_COMPONENTS = {
    "queue_priority": "kueue",
    "topology": "kueue-topology",
    "priority_class": "priority",
    "time_limit": "time-limit",
}


@dataclass
class _ConvertedRole:
    """A role, converted."""

    command: list[str]
    spec: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    add: list[str] = field(default_factory=list)
    patches: list[dict[str, Any]] = field(default_factory=list)


def unique_name(name: str) -> str:
    """A unique name, short enough that pod names with numbers are valid."""
    return f"{name[:40].rstrip('-')}-{secrets.token_hex(3)}"


def render_request(
    app: AppDef, cfg: Mapping[str, Any], name: str, code: Carrier | None = None
) -> RenderRequest:
    """The render request for an app. ``cfg`` are the scheduler's options, ``name`` is the job's
    name, ``code`` what the pods use before the installed code. Raises UsageError."""
    if len(app.roles) != 1:
        raise UsageError(
            f"The app {app.name} has {len(app.roles)} roles, but kubernetes_job supports one; "
            "submit the roles separately, or use TorchX's scheduler kubernetes."
        )
    overlay = manifests.overlay(str(cfg["overlay"]))
    role = _substituted(app.roles[0], f"{cfg['namespace']}:{name}")
    job = _agent_job(role) if _starts_agent(role) else _plain_job(role)
    _resources(job, role, overlay, cfg)
    _mounts(job, role)
    job.env = {**role.env, **job.env}
    changes = Changes(
        spec={key: Change(value, f"the app {app.name}") for key, value in job.spec.items()},
        name=Change(name, "TorchX"),
        env=job.env,
        namespace=str(cfg["namespace"]),
        stop_deadline=(
            Change(cfg["stop_deadline"], "-cfg stop_deadline")
            if cfg.get("stop_deadline") is not None
            else None
        ),
    )
    _labels(app, role)
    metadata = {"labels": {ROLE: role.name}, "annotations": dict(app.metadata) or None}
    job.patches.append({"metadata": metadata})
    if code is not None:
        values = {**overlay.run["spec"], **job.spec}
        requests = {key: str(values[key]) for key in ("cpu", "memory")}
        text = str(values["scratch"])  # what is no quantity is refused by name when rendered
        scratch = number(text) if rules.BYTES.fullmatch(text) else 0
        job.patches.append(run_code.job_patch(code, name, role.image, job.env, requests, scratch))
    add = [*job.add, *(cfg.get("components") or [])]
    leave_out = [] if role.resource.gpu > 0 else ["gpu"]
    if any(_is_runs(mount.dst_path) for mount in role.mounts):
        leave_out.append("pvc")  # the claim is not used
    return RenderRequest(overlay.name, changes, add, leave_out, job.patches)


def _labels(app: AppDef, role: Role) -> None:
    """Checks what becomes labels and annotations. Raises UsageError."""
    if not rules.LABEL_VALUE.fullmatch(role.name):
        raise UsageError(
            f"The role of the app {app.name} is {role.name!r}, which becomes a label of the pods; "
            "use at most 63 letters, digits, -, _ and ."
        )
    for key in app.metadata:
        if not rules.QUALIFIED.fullmatch(key):
            raise UsageError(
                f"--metadata has the key {key!r}, which becomes an annotation; use letters, "
                "digits, -, _ and ., if needed after a domain and /."
            )
    for key, value in role.resource.capabilities.items():
        is_label = rules.QUALIFIED.fullmatch(key) and rules.LABEL_VALUE.fullmatch(str(value))
        if "/" in key and not is_label:
            raise UsageError(
                f"The named resource has the capability {key}={value}, which becomes a node "
                "selector, but this is not a label; correct it in the file of named resources."
            )
    for name, count in role.resource.devices.items():
        if not rules.QUALIFIED.fullmatch(name) or count < 1:
            raise UsageError(
                f"The named resource has the device {name!r}: {count}, but must have the name of a "
                "resource, such as vpc.amazonaws.com/efa, and a number of at least 1; correct it "
                "in the file of named resources."
            )


def _starts_agent(role: Role) -> bool:
    words = role.args[1:] if role.args[:1] == ["-P"] else role.args
    return role.entrypoint == "python" and tuple(words[: len(AGENT)]) == AGENT


def _substituted(role: Role, app_id: str) -> Role:
    """The role with TorchX's macros substituted. Kubernetes substitutes ``$(NAME)``: the node's
    number becomes such a reference, and other text of this form is escaped."""
    from torchx.specs import macros

    values = macros.Values(img_root="/app", app_id=app_id, replica_id=_INDEX, rank0_env=_HEAD)
    made = values.apply(role)

    def literal(text: str) -> str:
        return text.replace("$(", "$$(").replace(_INDEX, "$(JOB_COMPLETION_INDEX)")

    made.args = [literal(word) for word in made.args]
    made.env = {key: literal(value) for key, value in made.env.items()}
    return made


def _agent_job(role: Role) -> _ConvertedRole:
    """A role that starts the agent: the template starts it instead, and its options become values
    of run.yaml or environment variables."""
    from launch.agent.arguments import parser

    options, command = agent_arguments(role.args) or ([], [])
    job = _ConvertedRole(command=command)
    given = vars(parser().parse_args(options))
    if given.pop("preflight_only"):
        raise UsageError(
            f"The role {role.name} has the agent's option --preflight-only, but an older agent in "
            "the image would ignore it and train; use the component isorun.doctor."
        )
    for key, value in given.items():
        if value is None or key in _BY_TEMPLATE:
            continue
        if key == "nnodes":
            least, _, most = str(value).partition(":")
            if most:
                job.add.append("elastic")
                job.spec["minNodes"] = least
        elif key == "nproc_per_node":
            number = whole_number(str(value))
            job.spec["processes"] = value if number is None else number
        else:
            job.env[variable(key)] = str(value)
    job.spec["command"] = job.command
    return job


def _plain_job(role: Role) -> _ConvertedRole:
    """A role that does not start the agent, such as a sweep. Pods are independent unless the role
    uses the host name of node 0."""
    words = [role.entrypoint, *role.args]
    job = _ConvertedRole(command=words, spec={"processes": 1, "command": words})
    if any(_HEAD in text for text in (*role.args, *role.env.values())):
        # At the end of the list: a variable can refer to earlier ones only.
        head = {"name": _HEAD, "value": "$(RDZV_HOST)"}
        place = "/spec/template/spec/containers/0/env/-"
        job.patches.append({"operations": [{"op": "add", "path": place, "value": head}]})
    else:
        job.add.append("independent")
    container = {"name": "train", "command": ["tini", "--"]}
    job.patches.append({"spec": {"template": {"spec": {"containers": [container]}}}})
    return job


def _resources(
    job: _ConvertedRole, role: Role, overlay: manifests.Overlay, cfg: Mapping[str, Any]
) -> None:
    resource = role.resource
    if resource.cpu <= 0 or resource.memMB <= 0:
        raise UsageError(
            f"The role {role.name} requests no cores or no memory; add a named resource, such as "
            "-h cpu_small."
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
    for option, key in TORCHX_OPTIONS.items():
        if cfg.get(option):
            job.spec[key] = cfg[option]
            job.add += [_COMPONENTS[option]] if option in _COMPONENTS else []
    shared = job.spec.get("sharedMemory") or overlay.run["spec"]["sharedMemory"]
    half = resource.memMB // 2
    if "sharedMemory" not in job.spec and number(shared) > half * 2**20:
        job.spec["sharedMemory"] = _mebibytes(half)  # the overlay's value is for larger nodes
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


def _mounts(job: _ConvertedRole, role: Role) -> None:
    volumes: list[dict[str, Any]] = []
    mounts: list[dict[str, Any]] = []
    for at, mount in enumerate(role.mounts):
        _check_mount(mount, [other.dst_path for other in role.mounts[:at]])
        name = f"mount-{at}"
        if _is_runs(mount.dst_path):
            name = "runs"  # replaces the template's volume
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
                f"The device {mount.src_path} (--mounts) cannot be mounted into an unprivileged "
                "pod; use the cluster's device plugin, and request its resource with `devices` of "
                "a named resource."
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


_MOUNTED = ("/dev/shm", "/scratch", "/tmp")
"""Where the templates mount volumes, besides /runs."""


def _check_mount(mount: Any, before: Sequence[str]) -> None:
    """Raises UsageError for what an API server refuses."""
    path = str(mount.dst_path)
    why = None
    if not rules.is_mount_path(path):
        why = f"dst={path} must be an absolute path without :"
    elif path.rstrip("/") in (*(p.rstrip("/") for p in before), *_MOUNTED):
        why = f"dst={path} has a mount already"
    elif type(mount).__name__ == "BindMount" and not rules.is_host_path(mount.src_path):
        why = f"src={mount.src_path} must be an absolute path of the hosts, without .."
    elif type(mount).__name__ == "VolumeMount" and not rules.SUBDOMAIN.fullmatch(mount.src):
        why = f"src={mount.src} must be the name of a PersistentVolumeClaim"
    if why:
        raise UsageError(f"--mounts: {why}; correct it.")


def _is_runs(path: str) -> bool:
    return path.rstrip("/") == "/runs"
