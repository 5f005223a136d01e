"""Pod security `restricted`, control by control.

The controls are those of Kubernetes' Pod Security Standards, baseline and restricted. Namespaces
with this level refuse pods that violate it.
"""

import pytest

from tests.launch.kubernetes.objects import (
    COMPONENTS,
    OVERLAYS,
    built,
    templates,
    with_component,
)

pytestmark = pytest.mark.xdist_group("kubernetes objects")  # which they build once

SYSCTLS = {
    "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
}  # fmt: skip
VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim",
    "projected", "secret",
}  # fmt: skip
SELINUX = {None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
# Components that document what they loosen.
LOOSENED = {"rdma-ib": ["train: capabilities.add IPC_LOCK"]}


def violations(template):
    """The violations of the standard in a pod template."""
    pod, metadata = template["spec"], template.get("metadata", {})
    context = pod.get("securityContext", {})
    found = [f"host namespaces: {k}" for k in ("hostNetwork", "hostPID", "hostIPC") if pod.get(k)]
    for volume in pod.get("volumes", []):
        found += [f"volume type {kind}" for kind in set(volume) - {"name"} - VOLUMES]
    found += [f"sysctl {s['name']}" for s in context.get("sysctls", []) if s["name"] not in SYSCTLS]
    for key, value in metadata.get("annotations", {}).items():
        if key.startswith("container.apparmor") and value not in ("runtime/default",):
            found.append(f"apparmor {value}")
    for kind in ("containers", "initContainers", "ephemeralContainers"):
        for container in pod.get(kind, []):
            found += [f"{container['name']}: {v}" for v in _container(container, context)]
    found += [f"pod: {v}" for v in _both(context)]
    return found


def _container(container, pod):
    own = container.get("securityContext", {})
    capabilities = own.get("capabilities", {})
    found = _both(own)
    if own.get("privileged"):
        found.append("privileged")
    if own.get("procMount") not in (None, "Default"):
        found.append("procMount")
    found += [f"hostPort {p['hostPort']}" for p in container.get("ports", []) if p.get("hostPort")]
    for hook in container.get("lifecycle", {}).values():
        if hook.get("httpGet", {}).get("host") or hook.get("tcpSocket", {}).get("host"):
            found.append("lifecycle host")
    for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
        if container.get(probe, {}).get("httpGet", {}).get("host"):
            found.append(f"{probe} host")
    if own.get("allowPrivilegeEscalation") is not False:
        found.append("allowPrivilegeEscalation is not false")
    if not (own.get("runAsNonRoot") or (pod.get("runAsNonRoot") and "runAsNonRoot" not in own)):
        found.append("runAsNonRoot is not true")
    profile = own.get("seccompProfile", pod.get("seccompProfile", {})).get("type")
    if profile not in ("RuntimeDefault", "Localhost"):
        found.append(f"seccomp profile {profile}")
    if "ALL" not in capabilities.get("drop", []):
        found.append("capabilities.drop lacks ALL")
    found += [
        f"capabilities.add {c}" for c in capabilities.get("add", []) if c != "NET_BIND_SERVICE"
    ]
    return found


def _both(context):
    """Controls that the security contexts of pods and containers have in common."""
    found = []
    selinux = context.get("seLinuxOptions", {})
    if selinux.get("type") not in SELINUX or selinux.get("user") or selinux.get("role"):
        found.append("seLinuxOptions")
    if context.get("runAsUser") == 0:
        found.append("runAsUser is 0")
    if context.get("windowsOptions", {}).get("hostProcess"):
        found.append("hostProcess")
    if context.get("appArmorProfile", {}).get("type") == "Unconfined":
        found.append("appArmorProfile")
    if context.get("seccompProfile", {}).get("type") == "Unconfined":
        found.append("seccompProfile")
    return found


def all_violations(objects):
    return [v for o in objects for t in templates(o) for v in violations(t)]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_restricted(overlay):
    objects = built(overlay)
    assert any(templates(o) for o in objects)
    assert all_violations(objects) == []


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_is_restricted_or_documents_what_it_loosens(component):
    assert all_violations(with_component(component)) == LOOSENED.get(component, [])


BREACHES = {
    "privileged": lambda pod, c: c["securityContext"].update(privileged=True),
    "runAsNonRoot": lambda pod, c: pod["securityContext"].pop("runAsNonRoot"),
    "runAsUser is 0": lambda pod, c: c["securityContext"].update(runAsUser=0),
    "seccomp": lambda pod, c: pod["securityContext"].pop("seccompProfile"),
    "capabilities.drop": lambda pod, c: c["securityContext"]["capabilities"].pop("drop"),
    "allowPrivilegeEscalation": lambda pod, c: c["securityContext"].pop("allowPrivilegeEscalation"),
    "volume type hostPath": lambda pod, c: pod["volumes"].append({"name": "x", "hostPath": {}}),
    "host namespaces": lambda pod, c: pod.update(hostNetwork=True),
    "hostPort": lambda pod, c: c.update(ports=[{"containerPort": 1, "hostPort": 1}]),
}


@pytest.mark.parametrize("told", BREACHES)
def test_a_violation_is_detected(told):
    (template,) = [t for o in built("cpu-demo") for t in templates(o)]
    BREACHES[told](template["spec"], template["spec"]["containers"][0])
    assert any(told in violation for violation in violations(template))
