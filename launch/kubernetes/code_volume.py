"""Sends code by the volume with the runs, where a pod that is made for it stores the archive before
the run that uses it is created."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.contract import UsageError, log
from launch.kubernetes import helper_pod, receive_code, state
from launch.kubernetes.cluster import Cluster
from launch.kubernetes.code_carrier import Carrier
from launch.kubernetes.containers import Container
from launch.kubernetes.rendering import Rendered

Object = dict[str, Any]
_KIND = "code"
_VOLUME = "runs"  # its name in the templates
_RUNS = "/runs"
_PURPOSE = "stores code on the volume with the runs"
# Runs the program that is before the archive in standard input.
_PROGRAM = "import sys; exec(sys.stdin.buffer.read(int(sys.argv[1])))"
_START_SECONDS = 1800.0
"""How long it may take until the pod runs, on a node that may have to pull a large image."""
_SECONDS = 120.0
"""How long the pod may take to look for an archive and compute its digest."""
_SLOWEST = 256 << 10
"""Bytes per second; a slower upload is given up."""
_KEPT = (
    "automountServiceAccountToken", "enableServiceLinks", "imagePullSecrets", "nodeSelector",
    "securityContext", "serviceAccountName", "tolerations",
)  # fmt: skip
_RESOURCES = {
    "requests": {"cpu": "100m", "memory": "256Mi", "ephemeral-storage": "64Mi"},
    "limits": {"cpu": "1", "memory": "256Mi", "ephemeral-storage": "64Mi"},
}


class Volume(Carrier):
    """Carries it as ``.code/DIGEST.tar.gz`` on the volume with the runs."""

    @property
    def source(self) -> str:
        """See Carrier."""
        return f"{_RUNS}/{self.bundle.key}"

    @property
    def mounts(self) -> list[Object]:
        """See Carrier."""
        return [{"name": _VOLUME, "mountPath": _RUNS}]

    @property
    def place(self) -> str:
        """See Carrier."""
        return f"{self.source} on the volume with the runs"

    def complete(self, rendered: Rendered) -> Rendered:
        """The same objects. Raises UsageError if the pods of the run have no such volume."""
        spec = pod_template_of(rendered)["spec"]
        volume: Object = next((v for v in spec.get("volumes") or [] if v["name"] == _VOLUME), {})
        if volume.keys() <= {"name", "emptyDir"}:
            raise UsageError(
                f"-cfg sync=true: the working tree has {len(self.bundle.archive):,} bytes "
                f"compressed (largest: {self.bundle.largest}), which only a volume with the runs "
                "or an object store can carry, and this run has no such volume; ignore data in "
                ".gitignore, add a volume with -cfg components=pvc, send it by a store with -cfg "
                "sync_store=s3://bucket/folder, or build an image with the code instead."
            )
        return rendered

    def send(self, cluster: Cluster, rendered: Rendered) -> None:
        """Stores the archive by a pod that is made for it."""
        cluster.create_shared(rendered.objects)  # the claim
        cluster.delete_ended_pods(helper_pod.selector(_KIND))
        pod = storing_pod(rendered)
        log(f"starting the pod {pod['metadata']['name']}, which {_PURPOSE}")
        with helper_pod.running(cluster, pod, _PURPOSE, seconds=_START_SECONDS) as container:
            if self._run(container, "has", b"", _SECONDS).strip() == "yes":
                log("the code is on the volume already")
                return
            archive = self.bundle.archive
            log(f"sending {len(archive) / 2**20:.1f} MiB of code")
            self._run(container, "receive", archive, _SECONDS + len(archive) / _SLOWEST)

    def _run(self, container: Container, action: str, data: bytes, seconds: float) -> str:
        program = Path(receive_code.__file__).read_bytes()
        words = [action, self.source, self.bundle.digest, str(len(self.bundle.archive))]
        return container.output(
            ["python", "-P", "-c", _PROGRAM, str(len(program)), *words], seconds, program + data
        )


def storing_pod(rendered: Rendered) -> Object:
    """A pod with the image, user and volume of the run, and with nothing else of it."""
    name, found = rendered.workload["metadata"]["name"], pod_template_of(rendered)["spec"]
    spec = {key: found[key] for key in _KEPT if key in found}
    main = found["containers"][0]
    kept = ("image", "imagePullPolicy", "securityContext")
    container = {
        "name": "code",
        **{key: main[key] for key in kept if key in main},
        "resources": _RESOURCES,
        "volumeMounts": [m for m in main["volumeMounts"] if m["name"] == _VOLUME],
    }
    affinity = helper_pod.near({"app.kubernetes.io/name": "isorun"})
    if nodes := (found.get("affinity") or {}).get("nodeAffinity"):
        affinity["nodeAffinity"] = nodes  # the volume may be made where this pod is
    spec |= {
        "containers": [container],
        "volumes": [v for v in found["volumes"] if v["name"] == _VOLUME],
        "affinity": affinity,
    }
    return helper_pod.helper_pod(name, _KIND, spec)


def pod_template_of(rendered: Rendered) -> Object:
    """The template of the pods; that of a TrainJob is in its runtime."""
    made = state.pod_template(rendered.workload)
    if made is None:
        runtime = next(o for o in rendered.objects if o["kind"] == "TrainingRuntime")
        made = state.pod_template({**runtime["spec"]["template"], "kind": "JobSet"})
    assert made is not None
    return made
