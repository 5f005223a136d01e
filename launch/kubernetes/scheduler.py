"""TorchX's scheduler `kubernetes_job`: plain Kubernetes, an Indexed Job with a headless Service, or
a JobSet; no Volcano. What it submits comes from the templates that `kubectl kustomize` reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, List  # noqa: UP035 - the spelling that 0.7.0 knows

from torchx.schedulers.api import (
    DescribeAppResponse,
    ListAppResponse,
    Scheduler,
    Stream,
    filter_regex,
)
from torchx.specs import AppDef, AppDryRunInfo, runopts

from launch.contract import UsageError
from launch.kubernetes import app as apps
from launch.kubernetes import logs, state
from launch.kubernetes.cluster import Cluster, connect, current_namespace
from launch.kubernetes.rendering import Rendered, as_yaml, render

NAME = "kubernetes_job"
_OURS = "app.kubernetes.io/name=isorun"
_QUEUED = "kueue.x-k8s.io/queue-name"
# Option, type, default, help.
_OPTIONS: list[tuple[str, type, Any, str]] = [
    ("namespace", str, None, "namespace; by default that of the kubeconfig's context"),
    ("overlay", str, "multi-node", "overlay of k8s/ that says what the app does not"),
    ("components", List[str], None, "components of k8s/ to add, with ; between"),  # noqa: UP006
    ("queue", str, None, "Kueue LocalQueue, with the component kueue; Volcano queue"),
    ("queue_priority", str, None, "Kueue WorkloadPriorityClass; adds the component kueue"),
    ("topology", str, None, "Kueue topology level that pods share if possible"),
    ("priority_class", str, None, "PriorityClass of the pods"),
    ("stop_deadline", int, None, "seconds that ranks have to save when they are stopped"),
    ("cpu", str, None, "cores of a node, where whole ones are too many, such as 500m"),
    ("shared_memory", str, None, "size of /dev/shm, a part of the memory, such as 8Gi"),
    ("scratch", str, None, "room for caches and temporary files, such as 32Gi"),
]


@dataclass(frozen=True)
class Submission:
    """What would be submitted, and where."""

    rendered: Rendered
    name: str
    namespace: str

    def __str__(self) -> str:
        return as_yaml(self.rendered.objects)


class KubernetesJobScheduler(Scheduler[Mapping[str, Any]]):  # type: ignore[misc]
    """See the module. An app's id is NAMESPACE:NAME."""

    def __init__(self, session_name: str) -> None:
        super().__init__(NAME, session_name)
        self._clusters: dict[str | None, Cluster] = {}

    def _cluster(self, namespace: str | None) -> Cluster:
        if namespace not in self._clusters:
            self._clusters[namespace] = connect(namespace)
        return self._clusters[namespace]

    def _run_opts(self) -> runopts:
        options = runopts()
        for name, kind, default, text in _OPTIONS:
            options.add(name, type_=kind, default=default, help=text)
        return options

    def _validate(self, app: AppDef, scheduler: str, cfg: Any = None) -> None:
        """Nothing: rendering finds it all, with better words."""

    def _submit_dryrun(self, app: AppDef, cfg: Mapping[str, Any]) -> AppDryRunInfo[Submission]:
        """Renders; needs kubectl or kustomize, and no cluster. Raises UsageError."""
        name = apps.unique_name(app.name)
        namespace = cfg.get("namespace") or current_namespace()
        if not apps.is_name(namespace):
            raise UsageError(
                f"The namespace is {namespace!r} (-cfg namespace), but names consist of at most 63 "
                "lower-case letters, digits and -."
            )
        rendered = render(apps.request(app, {**cfg, "namespace": namespace}, name))
        return AppDryRunInfo(Submission(rendered, name, namespace), str)

    def schedule(self, dryrun_info: AppDryRunInfo[Submission]) -> str:
        """Submits. Raises UsageError or RetryError."""
        request = dryrun_info.request
        workload = request.rendered.workload
        if workload["apiVersion"] not in ("batch/v1", "jobset.x-k8s.io/v1alpha2"):
            raise UsageError(
                f"{NAME} can submit Jobs and JobSets, but the overlay makes a {workload['kind']} "
                f"of {workload['apiVersion']}; write it out by `torchx run --dryrun` or `python -m "
                "launch render` and apply it by kubectl."
            )
        cluster = self._cluster(request.namespace)
        cluster.submit(request.rendered.objects, workload)
        return f"{request.namespace}:{request.name}"

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """The state of the job and its pods; None if it is not there."""
        cluster, name = self._located(app_id)
        job = cluster.find(name)
        return state.describe(app_id, job, cluster.pods(name)) if job else None

    def exit_codes(self, app_id: str) -> list[int]:
        """Of the nodes, for the launch ledger."""
        cluster, name = self._located(app_id)
        return state.exit_codes(cluster.pods(name))

    def list(self, cfg: Mapping[str, Any] | None = None) -> list[ListAppResponse]:
        """isorun's jobs in the namespace, the newest last."""
        cluster = self._cluster((cfg or {}).get("namespace"))
        jobs = sorted(cluster.all(_OURS), key=lambda j: str(j["metadata"]["creationTimestamp"]))
        return [
            ListAppResponse(
                app_id=f"{cluster.namespace}:{job['metadata']['name']}", state=state.app_state(job)
            )
            for job in jobs
        ]

    def _cancel_existing(self, app_id: str) -> None:
        """Stops the pods, which save, and keeps the job to be looked at. One that Kueue manages is
        deleted: suspending is Kueue's own way to say something else."""
        cluster, name = self._located(app_id)
        if job := cluster.find(name):
            if _QUEUED in (job["metadata"].get("labels") or {}):
                cluster.delete(job["kind"], name)
            else:
                cluster.suspend(job["kind"], name, state.CANCELLED)

    def _delete_existing(self, app_id: str) -> None:
        """Removes the job and all that belongs to it; the volume of the runs stays."""
        cluster, name = self._located(app_id)
        if job := cluster.find(name):
            cluster.delete(job["kind"], name)

    def delete(self, app_id: str) -> None:
        """TorchX 0.7.0 has no such command, only the nightly."""
        if self.exists(app_id):
            self._delete_existing(app_id)

    def log_iter(
        self,
        app_id: str,
        role_name: str,
        k: int = 0,
        regex: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        should_tail: bool = False,
        streams: Stream | None = None,
    ) -> Iterable[str]:
        """The lines of node ``k``, of all pods that have been it. Raises UsageError."""
        if until is not None:
            raise UsageError(f"{NAME} cannot read a log up to a time (until); leave it out.")
        if streams not in (None, Stream.COMBINED):
            raise UsageError(
                f"{NAME} cannot tell {streams} from the rest: pods have one log; leave it out."
            )
        cluster, name = self._located(app_id)
        lines = logs.follow(cluster, name, k, since=since, to_the_end=should_tail)
        return filter_regex(regex, lines) if regex else lines

    def _located(self, app_id: str) -> tuple[Cluster, str]:
        namespace, colon, name = app_id.partition(":")
        if not colon:
            raise UsageError(
                f"{app_id!r} is not a job of {NAME}; write {NAME}://SESSION/NAMESPACE:NAME, as "
                "`torchx run` and `torchx list` print it."
            )
        return self._cluster(namespace), name


def create_scheduler(session_name: str, **_: Any) -> KubernetesJobScheduler:
    """What TorchX asks for by the entry point."""
    return KubernetesJobScheduler(session_name)
