"""Requests to a cluster's API; its errors become UsageError or RetryError."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from launch.contract import RetryError, RunError, UsageError
from launch.kubernetes import trainer
from launch.kubernetes.ends import REASONS, last_time
from launch.torchx.refusals import cluster_refusal

Object = dict[str, Any]
_TRAINER = {"group": "trainer.kubeflow.org", "version": "v1alpha1"}
_CUSTOM = {
    "JobSet": {"group": "jobset.x-k8s.io", "version": "v1alpha2", "plural": "jobsets"},
    "TrainJob": {**_TRAINER, "plural": "trainjobs"},
    "TrainingRuntime": {**_TRAINER, "plural": "trainingruntimes"},
    "Workload": {"group": "kueue.x-k8s.io", "version": "v1beta2", "plural": "workloads"},
}
SUBMITTED = (
    "batch/v1",
    *(f"{_CUSTOM[kind]['group']}/{_CUSTOM[kind]['version']}" for kind in ("JobSet", "TrainJob")),
)
"""The ``apiVersion`` of each kind of workload that can be submitted."""
# Kinds that the runs of a namespace share: created if missing, and never deleted. The name of a
# ConfigMap contains a hash of its content, unless it holds the code of a run. A CronJob serves the
# whole volume.
_SHARED = ("ServiceAccount", "PersistentVolumeClaim", "ConfigMap", "CronJob")
CODE_DIGEST = "isorun/code"
"""The annotation with the digest of the code that a run was submitted with."""
_CALLS = {
    "ServiceAccount": ("CoreV1Api", "service_account"),
    "PersistentVolumeClaim": ("CoreV1Api", "persistent_volume_claim"),
    "ConfigMap": ("CoreV1Api", "config_map"),
    "Secret": ("CoreV1Api", "secret"),
    "Service": ("CoreV1Api", "service"),
    "NetworkPolicy": ("NetworkingV1Api", "network_policy"),
    "CronJob": ("BatchV1Api", "cron_job"),
    "Job": ("BatchV1Api", "job"),
    "Pod": ("CoreV1Api", "pod"),
}
_SECONDS = (10, 60)  # time-outs: to connect, and between two bytes of a response


class Cluster:
    """One namespace of a cluster."""

    def __init__(self, client: Any, namespace: str) -> None:
        self._client = client
        self.namespace = namespace

    def _api(self, name: str) -> Any:
        from kubernetes import client

        return getattr(client, name)(self._client)

    def submit(self, objects: Sequence[Object], workload: Object) -> None:
        """Creates shared objects, then the workload, then the objects that it owns. Raises
        UsageError or RetryError; the workload is deleted then."""
        self.create_shared(objects)
        if workload["kind"] == "TrainJob":
            uid = self._create_train_job(objects, workload)
        else:
            uid = self._create(workload)["metadata"]["uid"]
        owned = _owned_by(workload, uid)
        try:
            for made in objects:
                if made["kind"] == "TrainingRuntime":
                    self._patch(made["kind"], made["metadata"]["name"], {"metadata": owned})
                elif not _is_shared(made) and made is not workload:
                    self._create({**made, "metadata": {**made["metadata"], **owned}})
        except RunError:
            self.delete(workload["kind"], workload["metadata"]["name"])
            raise

    def create_shared(self, objects: Sequence[Object]) -> None:
        """Creates those objects that the runs of a namespace share and that do not exist. Raises
        UsageError or RetryError."""
        for made in objects:
            if _is_shared(made):
                self._create(made, may_exist=True)

    def create(self, made: Object, owner: Object | None = None) -> None:
        """Creates an object that is deleted with its owner, if it has one. Raises UsageError or
        RetryError."""
        owned = _owned_by(owner, owner["metadata"]["uid"]) if owner else {}
        self._create({**made, "metadata": {**made["metadata"], **owned}})

    def _create_train_job(self, objects: Sequence[Object], workload: Object) -> str:
        """Creates the runtimes, then the TrainJob, which Kubeflow Trainer refuses until it has
        noticed its runtime; returns its uid."""
        runtimes = [made for made in objects if made["kind"] == "TrainingRuntime"]
        try:
            for made in runtimes:
                self._create(made)
            made = trainer.when_noticed(
                lambda: self._create(workload), lambda text: "runtime" in text.lower()
            )
            return str(made["metadata"]["uid"])
        except RunError:
            for made in runtimes:
                self.delete(made["kind"], made["metadata"]["name"])
            raise

    def _create(self, made: Object, *, may_exist: bool = False) -> Object:
        from kubernetes.client.rest import ApiException

        name = made["metadata"]["name"]
        with _translated(f"create the {made['kind']} {name} in the namespace {self.namespace}"):
            try:
                if made["kind"] in _CUSTOM:
                    return self._custom(made["kind"], "create_namespaced_custom_object", body=made)
                api, suffix = _CALLS[made["kind"]]
                return self._call(api, f"create_namespaced_{suffix}", self.namespace, made)
            except ApiException as error:
                if error.status == 409 and may_exist:
                    return made
                raise

    def _call(self, api: str, method: str, *arguments: Any, **more: Any) -> Object:
        """One request. Returns the response as plain JSON: the client's types reject responses of
        servers of other versions."""
        answer = getattr(self._api(api), method)(
            *arguments, _preload_content=False, _request_timeout=_SECONDS, **more
        )
        plain: Object = json.loads(answer.data)
        return plain

    def _custom(self, kind: str, method: str, **more: Any) -> Object:
        place = {**_CUSTOM[kind], "namespace": self.namespace}
        return self._call("CustomObjectsApi", method, **place, **more)

    def find(self, name: str) -> Object | None:
        """The Job or JobSet with this name, else the TrainJob; None if there is none. The JobSet of
        a TrainJob has the labels and annotations of both."""
        found = self._found("Job", name) or self._found("JobSet", name)
        if found is None or changed_kind(found) == "TrainJob":
            owner = self._found("TrainJob", name)
            if found is None or owner is None:
                return found or owner
            notes = {
                key: {**(found["metadata"].get(key) or {}), **(owner["metadata"].get(key) or {})}
                for key in ("labels", "annotations")
            }
            found = {**found, "metadata": {**found["metadata"], **notes}}
        return found

    def _found(self, kind: str, name: str) -> Object | None:
        with _translated(f"read the {kind} {name} in the namespace {self.namespace}", missing=True):
            if kind in _CUSTOM:
                made = self._custom(kind, "get_namespaced_custom_object", name=name)
                return {**made, "kind": kind}
            return self._call("BatchV1Api", "read_namespaced_job", name, self.namespace)
        return None

    def all(self, selector: str) -> list[Object]:
        """The TrainJobs, and the JobSets and Jobs without an owner, that match a label
        selector."""
        found: list[Object] = []
        with _translated(f"list the Jobs in the namespace {self.namespace}"):
            listed = self._call(
                "BatchV1Api", "list_namespaced_job", self.namespace, label_selector=selector
            )
            jobs = [{**job, "kind": "Job"} for job in listed["items"]]
            found += [job for job in jobs if not job["metadata"].get("ownerReferences")]
        for kind in ("JobSet", "TrainJob"):
            with _translated(f"list the {kind}s in the namespace {self.namespace}", missing=True):
                listed = self._custom(
                    kind, "list_namespaced_custom_object", label_selector=selector
                )
                owned = [{**item, "kind": kind} for item in listed["items"]]
                found += [item for item in owned if not item["metadata"].get("ownerReferences")]
        return found

    def pods(self, name: str) -> list[Object]:
        """The pods of a run, also those that failed, the oldest first."""
        with _translated(f"list the pods of {name} in the namespace {self.namespace}"):
            pods = self._listed_pods(f"app.kubernetes.io/instance={name}")
        return sorted(pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def _listed_pods(self, selector: str) -> list[Object]:
        listed = self._call(
            "CoreV1Api", "list_namespaced_pod", self.namespace, label_selector=selector
        )
        pods: list[Object] = listed["items"]
        return pods

    def delete_ended_pods(self, selector: str) -> None:
        """Deletes the pods with these labels that have ended, if that is allowed."""
        with suppress(RunError), _translated("list pods"):
            for pod in self._listed_pods(selector):
                if pod["status"].get("phase") in ("Succeeded", "Failed"):
                    self.delete("Pod", pod["metadata"]["name"])

    def refused_pods(self, name: str) -> str:
        """Why the cluster refuses to create pods of a run, such as a quota or pod security: the
        last warning about its Job; empty if there is none, or if events cannot be read."""
        events = self._events("reason=FailedCreate", ("FailedCreate",))
        found = [e for e in events if e["involvedObject"].get("name") in (name, f"{name}-node-0")]
        return str(found[-1].get("message", "")) if found else ""

    def failed_attempts(self, name: str) -> list[Object]:
        """The events about the failures of the Job in a JobSet, which also tell of Jobs that are
        gone, the oldest first; the cluster keeps them for an hour or so. Empty if they cannot be
        read."""
        job = f"{name}-node-0"
        found = self._events(f"involvedObject.name={job}", REASONS)
        return [event for event in found if event["involvedObject"].get("name") == job]

    def _events(self, selector: str, reasons: Collection[str]) -> list[Object]:
        """The events that a field selector selects, with these reasons, the oldest first; empty if
        they cannot be read."""
        with suppress(RunError), _translated("list events"):
            listed = self._call(
                "CoreV1Api", "list_namespaced_event", self.namespace,
                field_selector=selector,
            )  # fmt: skip
            return sorted((e for e in listed["items"] if e["reason"] in reasons), key=last_time)
        return []

    def queued(self) -> list[Object]:
        """The workloads of Kueue in the namespace; none if there is no Kueue, or if they cannot be
        read."""
        with suppress(RunError), _translated("list the workloads of Kueue", missing=True):
            listed = self._custom("Workload", "list_namespaced_custom_object")
            items: list[Object] = listed["items"]
            return items
        return []

    def pod(self, name: str) -> Object | None:
        """One pod; None if it does not exist."""
        with _translated(f"read the pod {name} in the namespace {self.namespace}", missing=True):
            return self._call("CoreV1Api", "read_namespaced_pod", name, self.namespace)
        return None

    def suspend(self, kind: str, name: str, annotation: str) -> None:
        """Suspends a workload, so that its pods end, and annotates it as cancelled."""
        body = {"metadata": {"annotations": {annotation: "true"}}, "spec": {"suspend": True}}
        with _translated(f"stop the {kind} {name} in the namespace {self.namespace}", missing=True):
            self._patch(kind, name, body)

    def _patch(self, kind: str, name: str, body: Object) -> None:
        if kind in _CUSTOM:
            self._custom(kind, "patch_namespaced_custom_object", name=name, body=body)
        else:
            self._call("BatchV1Api", "patch_namespaced_job", name, self.namespace, body)

    def delete(self, kind: str, name: str) -> None:
        """Deletes an object, its pods and all objects that it owns."""
        how = {"propagation_policy": "Foreground"}
        with _translated(
            f"delete the {kind} {name} in the namespace {self.namespace}", missing=True
        ):
            if kind in _CUSTOM:
                self._custom(kind, "delete_namespaced_custom_object", name=name, **how)
            else:
                api, suffix = _CALLS[kind]
                self._call(api, f"delete_namespaced_{suffix}", name, self.namespace, **how)

    def log(
        self, pod: str, container: str, *, follow: bool, since: int | None, tail: int | None = None
    ) -> Iterator[str]:
        """The lines of a pod's log, each after its timestamp, from the last ``since`` seconds, or
        the last ``tail`` lines."""
        more = {"since_seconds": since} if since else {}
        more |= {"tail_lines": tail} if tail else {}
        # No read time-out while following: a training may log nothing for a long time.
        with _translated(f"read the log of the pod {pod}", missing=True):
            answer = self._api("CoreV1Api").read_namespaced_pod_log(
                pod, self.namespace, container=container, follow=follow, timestamps=True,
                _preload_content=False, _request_timeout=(_SECONDS[0], None if follow else 60),
                **more,
            )  # fmt: skip
            try:
                yield from _lines(answer.stream(2**14))
            finally:
                answer.release_conn()


def _owned_by(owner: Object, uid: str) -> Object:
    """The metadata of objects that are deleted with their owner."""
    reference = {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": uid,
    }
    return {"ownerReferences": [reference]}


def changed_kind(job: Object) -> str:
    """The kind of the object to suspend or delete: the TrainJob, if it owns this JobSet."""
    owners = [each["kind"] for each in job["metadata"].get("ownerReferences") or []]
    return "TrainJob" if "TrainJob" in owners else str(job["kind"])


def _is_shared(made: Object) -> bool:
    notes = made["metadata"].get("annotations") or {}
    return made["kind"] in _SHARED and CODE_DIGEST not in notes


def connect(namespace: str | None = None) -> Cluster:
    """The cluster of the kubeconfig's context, or the one that this process runs in. The default
    namespace is the context's. Raises UsageError."""
    from kubernetes import client, config

    try:
        made = config.new_client_from_config(_kubeconfig())
    except config.ConfigException as error:
        try:
            config.load_incluster_config()
        except config.ConfigException:
            raise UsageError(
                f"No cluster is configured: {str(error).rstrip('.')}; set KUBECONFIG to a "
                "kubeconfig file."
            ) from None
        made = client.ApiClient()
    return Cluster(made, namespace or current_namespace())


def current_namespace() -> str:
    """The namespace of the kubeconfig's context, or `default`."""
    from kubernetes import config

    try:
        _, active = config.list_kube_config_contexts(_kubeconfig())
    except config.ConfigException:
        return "default"
    return str(active["context"].get("namespace") or "default")


def _kubeconfig() -> str:
    """The path of the kubeconfig. The client library reads the variable only when imported."""
    return os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line.decode(errors="replace") + "\n" for line in whole)
    if rest:
        yield rest.decode(errors="replace") + "\n"


@contextmanager
def _translated(what: str, *, missing: bool = False) -> Iterator[None]:
    """Translates the client's errors; with ``missing``, a 404 response is ignored."""
    from kubernetes.client.rest import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        if error.status == 404 and missing:
            return
        if not (refusal := cluster_refusal(error)):
            raise
        if refusal.later:
            raise RetryError(
                f"The cluster failed to {what}: {refusal.reason}; {refusal.advice}."
            ) from None
        raise UsageError(
            f"The cluster refused to {what}: {refusal.reason}; {refusal.advice}."
        ) from None
    except HTTPError as error:
        raise RetryError(
            f"The cluster could not be reached to {what}: {getattr(error, 'reason', error)}; check "
            "the network and the kubeconfig, then retry."
        ) from None
