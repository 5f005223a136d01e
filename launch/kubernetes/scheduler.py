"""The TorchX scheduler `kubernetes_job`: an Indexed Job with a headless Service, a JobSet or a
TrainJob, made from the templates under k8s/. It needs no Volcano."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, List  # noqa: UP035 - TorchX 0.7.0 needs this spelling

from torchx.schedulers.api import (
    DescribeAppResponse,
    ListAppResponse,
    Scheduler,
    Stream,
    filter_regex,
)
from torchx.specs import AppDef, AppDryRunInfo, runopts

from launch.contract import UsageError, log
from launch.kubernetes import from_torchx, logs, run_code, run_secret, state
from launch.kubernetes.cluster import (
    SUBMITTED,
    Cluster,
    changed_kind,
    connect,
    current_namespace,
)
from launch.kubernetes.code_carrier import Carrier
from launch.kubernetes.code_options import CODE_OPTIONS, carried
from launch.kubernetes.notes import notes
from launch.kubernetes.rendering import Rendered, as_yaml, render

NAME = "kubernetes_job"
_OURS = "app.kubernetes.io/name=isorun"
_QUEUED = "kueue.x-k8s.io/queue-name"
# Option, type, default, help.
_OPTIONS: list[tuple[str, type, Any, str]] = [
    ("namespace", str, None, "namespace; default: that of the kubeconfig's context"),
    ("overlay", str, "multi-node", "overlay in k8s/, for everything that the app does not set"),
    ("components", List[str], None, "components in k8s/ to add, separated by ;"),  # noqa: UP006
    ("queue", str, None, "Kueue LocalQueue (with the component kueue), or Volcano queue"),
    ("queue_priority", str, None, "Kueue WorkloadPriorityClass; adds the component kueue"),
    ("topology", str, None, "Kueue topology level that all pods should share"),
    ("priority_class", str, None, "PriorityClass of the pods"),
    ("stop_deadline", int, None, "seconds that ranks have to save a checkpoint at a stop"),
    ("time_limit", int, None, "seconds after which the run, or its restarts as JobSet, end"),
    ("cpu", str, None, "cores of a node, as a Kubernetes quantity such as 500m"),
    ("shared_memory", str, None, "size of /dev/shm, which counts toward memory, such as 8Gi"),
    ("scratch", str, None, "space for caches and temporary files, such as 32Gi"),
    *CODE_OPTIONS,
]


@dataclass(frozen=True)
class Submission:
    """The objects to submit, and the namespace."""

    rendered: Rendered
    name: str
    namespace: str
    code: Carrier | None = None
    """The working tree, if it is sent."""

    def __str__(self) -> str:
        return as_yaml([_without_archives(made) for made in self.rendered.objects])


def _without_archives(made: dict[str, Any]) -> dict[str, Any]:
    """An object with the sizes of its binary data instead of these, which are not for reading."""
    data = {key: f"({len(text)} characters)" for key, text in made.get("binaryData", {}).items()}
    return {**made, "binaryData": data} if data else made


class KubernetesJobScheduler(Scheduler[Mapping[str, Any]]):  # type: ignore[misc]
    """See the module. The id of an app is NAMESPACE:NAME."""

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
        """Nothing: rendering makes all checks."""

    def _submit_dryrun(self, app: AppDef, cfg: Mapping[str, Any]) -> AppDryRunInfo[Submission]:
        """Renders the objects with kubectl or kustomize, without a cluster. Raises UsageError."""
        name = from_torchx.unique_name(app.name)
        namespace = cfg.get("namespace") or current_namespace()
        code = carried(cfg)
        request = from_torchx.render_request(app, {**cfg, "namespace": namespace}, name, code)
        rendered = render(request)
        if code is not None:
            rendered = run_code.with_code(rendered, code)
            for note in code.bundle.notes:
                log(f"warning: {note}")
        return AppDryRunInfo(Submission(rendered, name, namespace, code), str)

    def schedule(self, dryrun_info: AppDryRunInfo[Submission]) -> str:
        """Submits, with a secret for the run's messages, which a dry run does not show. Raises
        UsageError or RetryError."""
        request = dryrun_info.request
        workload = request.rendered.workload
        if workload["apiVersion"] not in SUBMITTED:
            raise UsageError(
                f"{NAME} submits Jobs, JobSets and TrainJobs only, but the overlay makes a "
                f"{workload['kind']} of {workload['apiVersion']}; print it with `torchx run "
                "--dryrun` or `isorun render`, and apply it with kubectl."
            )
        cluster = self._cluster(request.namespace)
        if request.code is not None:
            request.code.send(cluster, request.rendered)
        signed = run_secret.with_secret(request.rendered)
        cluster.submit(signed.objects, signed.workload)
        return f"{request.namespace}:{request.name}"

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """The state of the job and its pods; None if there is no such job."""
        cluster, name = self._located(app_id)
        job = cluster.find(name)
        if job is None:
            return None
        pods = cluster.pods(name)
        return state.describe(app_id, job, pods, notes(cluster, job, pods))

    def exit_codes(self, app_id: str) -> list[int]:
        """The exit codes of the nodes."""
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
        """Suspends the job: its pods save and end, and the object stays. A job managed by Kueue is
        deleted instead, since Kueue itself sets `suspend`."""
        cluster, name = self._located(app_id)
        if job := cluster.find(name):
            kind = changed_kind(job)
            if _QUEUED in (job["metadata"].get("labels") or {}):
                cluster.delete(kind, name)
            else:
                cluster.suspend(kind, name, state.CANCELLED)

    def _delete_existing(self, app_id: str) -> None:
        """Deletes the job and the objects that it owns; the volume with the runs stays."""
        cluster, name = self._located(app_id)
        if job := cluster.find(name):
            cluster.delete(changed_kind(job), name)

    def delete(self, app_id: str) -> None:
        """For TorchX's nightly; TorchX 0.7.0 has no such command."""
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
        """The log lines of node ``k``, from all of its pods. Raises UsageError."""
        if until is not None:
            raise UsageError(f"{NAME} cannot read a log up to a given time; remove --until.")
        if streams not in (None, Stream.COMBINED):
            raise UsageError(
                f"{NAME} cannot select the stream {streams}, since pods have one combined log; "
                "remove --streams."
            )
        cluster, name = self._located(app_id)
        lines = logs.follow(cluster, name, k, since=since, to_the_end=should_tail)
        return filter_regex(regex, lines) if regex else lines

    def _located(self, app_id: str) -> tuple[Cluster, str]:
        namespace, colon, name = app_id.partition(":")
        if not colon:
            raise UsageError(
                f"{app_id!r} is not the id of a {NAME} job; use {NAME}://SESSION/NAMESPACE:NAME, "
                "as `torchx run` and `torchx list` print it."
            )
        return self._cluster(namespace), name


def create_scheduler(session_name: str, **_: Any) -> KubernetesJobScheduler:
    """The factory that TorchX calls."""
    return KubernetesJobScheduler(session_name)
