"""A small Kubernetes: its objects, and the parts of the Indexed Job and JobSet controllers that our
clients rely on. tests/support/api_server.py serves it on a port.

Pods either do what a test specifies (``end``, ``say``) or are processes of this machine
(tests/support/kubelet.py). Clients poll; there are no watches and no access control.
"""

import copy
import itertools
import re
import secrets
import threading
import time
from datetime import UTC, datetime

from tests.support.controllers import INDEX, JOB, Controllers, labels, now

PLURALS = {
    "v1": {
        "pods": "Pod", "services": "Service", "serviceaccounts": "ServiceAccount",
        "persistentvolumeclaims": "PersistentVolumeClaim", "configmaps": "ConfigMap",
        "secrets": "Secret", "events": "Event", "namespaces": "Namespace", "nodes": "Node",
        "persistentvolumes": "PersistentVolume",
    },
    "batch/v1": {"jobs": "Job", "cronjobs": "CronJob"},
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy"},
    "storage.k8s.io/v1": {"storageclasses": "StorageClass"},
    "jobset.x-k8s.io/v1alpha2": {"jobsets": "JobSet"},
    "trainer.kubeflow.org/v1alpha1": {
        "trainjobs": "TrainJob", "trainingruntimes": "TrainingRuntime",
    },
}  # fmt: skip
CLUSTER_WIDE = {"namespaces", "nodes", "persistentvolumes", "storageclasses"}
PATH = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+/[^/]+))"
    r"(?:/namespaces/(?P<ns>[^/]+)(?=/))?/(?P<plural>[a-z]+)"
    r"(?:/(?P<name>[^/]+))?(?:/(?P<sub>log|eviction))?"
)


class Refused(Exception):
    """A response with an error status."""

    def __init__(self, code, reason, message):
        super().__init__(message)
        self.status = {
            "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code,
            "reason": reason, "message": message,
        }  # fmt: skip


class Cluster(Controllers):
    """The objects of the cluster, and what its controllers do with them."""

    def __init__(self, *, jobsets=True, starts_pods=True):
        self.objects = {}  # (plural, namespace, name) -> object
        self.logs = {}  # pod uid -> [(time, line)]
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.starts_pods = starts_pods
        self.refuse = {}  # (method, plural) -> Refused, for one request
        self.cut_after = None  # lines after which the next followed log breaks off
        self.requests = []
        self.kubelet = None
        self._ages, self._suffixes = itertools.count(), itertools.count()
        self._groups = {k: v for k, v in PLURALS.items() if jobsets or "jobset" not in k}

    # ------------------------------------------------------------------ called by tests

    def pods(self, instance=None):
        """The existing pods, the oldest first."""
        with self.lock:
            found = [o for (plural, *_), o in self.objects.items() if plural == "pods"]
            if instance:
                found = [
                    p for p in found if labels(p).get("app.kubernetes.io/instance") == instance
                ]
            return sorted(found, key=lambda p: p["age"])

    def pod(self, index, instance=None):
        """The newest pod with a completion index."""
        return [p for p in self.pods(instance) if labels(p).get(INDEX) == str(index)][-1]

    def say(self, pod, *lines):
        """Appends lines to the log of a pod."""
        with self.changed:
            self.logs[pod["metadata"]["uid"]] += [(now(), line) for line in lines]
            self.changed.notify_all()

    def start(self, pod):
        """Assigns a pending pod to a node and starts it."""
        with self.changed:
            pod["spec"]["nodeName"] = f"node-{labels(pod).get(INDEX, 0)}"
            pod["status"] = {"phase": "Running", "podIP": "127.0.0.1"}
            self._container(pod, {"running": {"startedAt": now()}})
            self.changed.notify_all()
        if self.kubelet:
            self.kubelet.start(pod)

    def end(self, pod, code=0, message="", *, disrupted=False):
        """Ends the container of a pod."""
        with self.changed:
            if pod["status"]["phase"] in ("Succeeded", "Failed"):
                return
            pod["status"]["phase"] = "Failed" if code or disrupted else "Succeeded"
            self._container(
                pod, {"terminated": {"exitCode": code, "message": message, "finishedAt": now()}}
            )
            if disrupted:
                condition = {"type": "DisruptionTarget", "status": "True"}
                pod["status"]["conditions"] = [condition]
            if pod["metadata"].get("deletionTimestamp"):
                self._forget("pods", pod)
            self._pod_ended(pod, code, disrupted)
            self.changed.notify_all()

    def _container(self, pod, state):
        name = pod["spec"]["containers"][0]["name"]
        pod["status"]["containerStatuses"] = [{"name": name, "state": state, "restartCount": 0}]

    # ------------------------------------------------------------------ verbs of the API

    def _find(self, plural, namespace, name):
        return self.objects.get((plural, namespace, name))

    def _get(self, plural, namespace, name):
        found = self._find(plural, namespace, name)
        if found is None:
            raise Refused(404, "NotFound", f'{plural} "{name}" not found')
        return found

    def _store(self, plural, made):
        metadata = made["metadata"]
        made["age"] = next(self._ages)
        metadata |= {
            "uid": secrets.token_hex(8),
            "creationTimestamp": now(),
            "resourceVersion": "1",
        }
        self.objects[plural, metadata.get("namespace"), metadata["name"]] = made

    def _forget(self, plural, made):
        metadata = made["metadata"]
        self.objects.pop((plural, metadata.get("namespace"), metadata["name"]), None)
        owned = [
            (key[0], o) for key, o in self.objects.items()
            if any(r["uid"] == metadata["uid"] for r in o["metadata"].get("ownerReferences", []))
        ]  # fmt: skip
        for kind, other in owned:
            if kind == "pods" and other["status"]["phase"] == "Running" and self.kubelet:
                self._delete_pod(other)
            else:
                self._forget(kind, other)

    def create(self, plural, namespace, body):
        name = body["metadata"]["name"]
        if self._find(plural, namespace, name):
            raise Refused(409, "AlreadyExists", f'{plural} "{name}" already exists')
        made = copy.deepcopy(body)
        if namespace:
            made["metadata"]["namespace"] = namespace
        self._store(plural, made)
        self._made(plural, made)
        return made

    def patch(self, plural, namespace, name, body):
        found = self._get(plural, namespace, name)
        was = (found.get("spec") or {}).get("suspend")
        _merge(found, body)
        is_now = (found.get("spec") or {}).get("suspend")
        if bool(is_now) == bool(was):
            return found
        if plural == "jobs" and is_now:
            for pod in [p for p in self.pods() if labels(p).get(JOB) == name]:
                self._delete_pod(pod)
                if pod["status"]["phase"] != "Running":
                    self._forget("pods", pod)
        elif plural == "jobs":
            self._start_job(found)
        elif plural == "jobsets":
            self.patch("jobs", namespace, f"{name}-node-0", {"spec": {"suspend": is_now}})
        return found

    def delete(self, plural, namespace, name):
        found = self._get(plural, namespace, name)
        if plural == "pods":
            self._delete_pod(found)
            if found["status"]["phase"] != "Running":
                self._forget("pods", found)
        else:
            self._forget(plural, found)
        return found

    def evict(self, namespace, name):
        pod = self._get("pods", namespace, name)
        pod["status"].setdefault("conditions", []).append(
            {"type": "DisruptionTarget", "status": "True"}
        )
        self._delete_pod(pod, disrupted=True)
        return {"kind": "Status", "apiVersion": "v1", "status": "Success"}

    def discovery(self, path):
        """The discovery documents, which kubectl requests first."""
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            names = [g for g in self._groups if "/" in g]
            versions = [{"groupVersion": g, "version": g.split("/")[1]} for g in names]
            groups = [
                {"name": v["groupVersion"].split("/")[0], "versions": [v], "preferredVersion": v}
                for v in versions
            ]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        if path == "/openapi/v3":
            places = ["apis/" + g if "/" in g else "api/" + g for g in self._groups]
            return {"paths": {p: {"serverRelativeURL": f"/openapi/v3/{p}"} for p in places}}
        if path.startswith("/openapi/v3/"):
            return self._validates(path.removeprefix("/openapi/v3/").partition("/")[2])
        group = path.removeprefix("/apis/").removeprefix("/api/")
        if group not in self._groups:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        verbs = ["create", "delete", "get", "list", "patch"]
        return {
            "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group,
            "resources": [
                {"name": p, "singularName": kind.lower(), "namespaced": p not in CLUSTER_WIDE,
                 "kind": kind, "verbs": verbs}
                for p, kind in self._groups[group].items()
            ],
        }  # fmt: skip

    def _validates(self, group):
        """Declares that the server validates unknown fields, which kubectl checks."""
        name, _, version = group.rpartition("/")
        parameter = {"name": "fieldValidation", "in": "query"}
        paths = {}
        for plural, kind in self._groups[group].items():
            what = {"group": name, "version": version, "kind": kind}
            operation = {"x-kubernetes-group-version-kind": what, "parameters": [parameter]}
            paths[f"/{group}/{plural}"] = {"patch": operation}
        return {"openapi": "3.0.0", "info": {}, "paths": paths}

    def answer(self, method, path, query, body):
        """Answers one request; log requests are handled by the server (api_server.py)."""
        with self.changed:
            self.requests.append((method, path))
            if path == "/version":
                return {"major": "1", "minor": "33", "gitVersion": "v1.33.0"}
            match = PATH.fullmatch(path)
            group = match and (match["core"] or match["group"])
            if not match or match["plural"] not in self._groups.get(group, {}):
                return self.discovery(path)
            plural, namespace, name = match["plural"], match["ns"], match["name"]
            if refused := self.refuse.pop((method, plural), None):
                raise refused
            if match["sub"] == "eviction":
                return self.evict(namespace, name)
            if method == "POST":
                return self.create(plural, namespace, body)
            if method == "PATCH":
                return self.patch(plural, namespace, name, body)
            if method == "DELETE":
                return self.delete(plural, namespace, name)
            if name:
                return self._get(plural, namespace, name)
            selector = query.get("labelSelector", [""])[0]
            wanted = dict(pair.split("=", 1) for pair in selector.split(",") if pair)
            items = [
                o for (p, ns, _), o in self.objects.items()
                if p == plural and namespace in (None, ns) and wanted.items() <= labels(o).items()
            ]  # fmt: skip
            kind = self._groups[group][plural]
            return {"kind": f"{kind}List", "apiVersion": group, "metadata": {}, "items": items}

    def log(self, namespace, name, query):
        """The lines of a pod's log; with ``follow``, further lines as they are written."""
        with self.lock:
            pod = self._get("pods", namespace, name)
            if pod["status"]["phase"] == "Pending":
                raise Refused(400, "BadRequest", f'container in pod "{name}" is waiting to start')
        follow = query.get("follow", ["false"])[0].lower() == "true"
        ago = float(query.get("sinceSeconds", ["0"])[0])
        oldest = datetime.fromtimestamp(time.time() - ago if ago else 0, UTC)
        return self._follow(
            pod, follow, oldest, query.get("timestamps", ["false"])[0].lower() == "true"
        )

    def _follow(self, pod, follow, oldest, timestamps):
        sent, lines = 0, self.logs[pod["metadata"]["uid"]]
        cut, self.cut_after = (self.cut_after, None) if follow else (None, self.cut_after)
        while True:
            with self.changed:
                while follow and sent == len(lines) and pod["status"]["phase"] == "Running":
                    self.changed.wait(1)
                new, over = lines[sent:], pod["status"]["phase"] != "Running" or not follow
            for when, line in new:
                if cut is not None and sent >= cut:
                    raise ConnectionAbortedError
                sent += 1
                if datetime.fromisoformat(when) >= oldest:
                    yield f"{when} {line}\n" if timestamps else f"{line}\n"
            if over and sent == len(lines):
                return


def _merge(target, patch):
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        elif isinstance(value, dict):
            if not isinstance(target.get(key), dict):
                target[key] = {}
            _merge(target[key], value)
        else:
            target[key] = value
