"""The Indexed Job and JobSet controllers, as far as our clients rely on them."""

import copy
import re
import secrets
from datetime import UTC, datetime

# Annotations of a pod: earlier failures of its index that the Job's limit counts, and ignores.
COUNTED = "batch.kubernetes.io/job-index-failure-count"
IGNORED = "batch.kubernetes.io/job-index-ignored-failure-count"
INDEX, JOB = "batch.kubernetes.io/job-completion-index", "batch.kubernetes.io/job-name"


def now():
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def labels(made):
    return made["metadata"].get("labels") or {}


def owner(made):
    metadata = made["metadata"]
    return {
        "apiVersion": made["apiVersion"], "kind": made["kind"], "name": metadata["name"],
        "uid": metadata["uid"], "controller": True,
    }  # fmt: skip


def has_ended(job):
    return any(c["type"] in ("Complete", "Failed") for c in job["status"].get("conditions", []))


def policy_action(spec, pod, code, disrupted):
    disrupted = disrupted or any(
        c["type"] == "DisruptionTarget" for c in pod["status"].get("conditions", [])
    )
    for number, rule in enumerate(spec.get("podFailurePolicy", {}).get("rules", [])):
        if code in rule.get("onExitCodes", {}).get("values", []):
            return rule["action"], number
        if disrupted and rule.get("onPodConditions"):
            return rule["action"], number
    return "Count", None


class Controllers:
    """A mixin of tests.support.cluster.Cluster, which holds the objects."""

    def _made(self, plural, made):
        if plural == "jobs":
            made["status"] = {}
            self._start_job(made)
        elif plural == "jobsets":
            made["status"] = {"restarts": 0}
            self._start_child(made)
        elif plural == "secrets" and self.starts_pods:
            for pod in self.pods():
                if pod["status"]["phase"] == "Pending" and self._has_its_secrets(pod):
                    self.start(pod)
        elif plural == "pods" and self.starts_pods:  # one without a controller
            self.logs[made["metadata"]["uid"]] = []
            self.start(made)

    def _start_job(self, job):
        if job["spec"].get("suspend"):
            return
        job["status"]["startTime"] = now()
        for index in range(min(job["spec"]["completions"], job["spec"]["parallelism"])):
            if index not in job["status"].get("done", []):
                self._make_pod(job, index)

    def _make_pod(self, job, index, after=None):
        """``after``: the earlier failures of this index, counted and ignored."""
        template = copy.deepcopy(job["spec"]["template"])
        name, metadata = job["metadata"]["name"], template.setdefault("metadata", {})
        metadata.setdefault("labels", {}).update({INDEX: str(index), JOB: name})
        for key, value in labels(job).items():
            if key.startswith("jobset"):
                metadata["labels"][key] = value
        if "backoffLimitPerIndex" in job["spec"]:
            counted, ignored = after or (0, 0)
            annotations = {**metadata.get("annotations", {}), COUNTED: str(counted)}
            metadata["annotations"] = annotations | ({IGNORED: str(ignored)} if ignored else {})
        metadata |= {
            "name": f"{name}-{index}-{next(self._suffixes):05d}",  # a random one may be taken
            "namespace": job["metadata"]["namespace"],
            "ownerReferences": [owner(job)],
        }
        pod = {"apiVersion": "v1", "kind": "Pod", **template, "status": {"phase": "Pending"}}
        pod["spec"]["hostname"] = f"{name}-{index}"
        self._store("pods", pod)
        self.logs[pod["metadata"]["uid"]] = []
        if self.starts_pods and self._has_its_secrets(pod):
            self.start(pod)

    def _has_its_secrets(self, pod):
        """Whether the Secrets exist that its variables come from; the kubelet waits for them."""
        namespace = pod["metadata"]["namespace"]
        env = [item for c in pod["spec"]["containers"] for item in c.get("env", [])]
        names = [item.get("valueFrom", {}).get("secretKeyRef", {}).get("name") for item in env]
        return all(self._find("secrets", namespace, name) for name in names if name)

    def _pod_ended(self, pod, code, disrupted):
        job = self._find("jobs", pod["metadata"]["namespace"], labels(pod).get(JOB))
        if job is None or has_ended(job) or job["spec"].get("suspend"):
            return
        index, spec, status = int(labels(pod)[INDEX]), job["spec"], job["status"]
        if pod["status"]["phase"] == "Succeeded":
            done = {*status.get("done", []), index}
            status |= {"done": sorted(done), "succeeded": len(done)}
            self._index_ended(job)
            return
        action, number = policy_action(spec, pod, code, disrupted)
        known = pod["metadata"].get("annotations", {})
        counted, ignored = (int(known.get(key, 0)) for key in (COUNTED, IGNORED))
        words = (
            f"failed with exit code {code}"
            if number is not None and not disrupted
            else "has DisruptionTarget"
        )
        where = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
        if action == "FailJob":
            message = (
                f"Container train for pod {where} {words} matching FailJob rule at index {number}"
            )
            self._finish(job, "Failed", "PodFailurePolicy", message)
        elif action == "Ignore":
            self._make_pod(job, index, (counted, ignored + 1))
        else:
            failures = status.setdefault("failures", {})
            failures[str(index)] = failures.get(str(index), 0) + 1
            limit = spec.get("backoffLimitPerIndex", spec.get("backoffLimit", 6))
            if action != "FailIndex" and failures[str(index)] <= limit:
                self._make_pod(job, index, (counted + 1, ignored))
            elif "backoffLimitPerIndex" not in spec or spec.get("maxFailedIndexes") == 0:
                reason = (
                    "MaxFailedIndexesExceeded"
                    if "maxFailedIndexes" in spec
                    else "BackoffLimitExceeded"
                )
                self._finish(job, "Failed", reason, "Job has failed too often")
            else:
                status.setdefault("gone", []).append(index)
                self._index_ended(job)

    def _index_ended(self, job):
        """Starts the next index, or ends the Job if there is none."""
        spec, status = job["spec"], job["status"]
        gone = status.get("gone", [])
        ended = len(status.get("done", [])) + len(gone)
        following = ended + spec["parallelism"] - 1
        if following < spec["completions"]:
            self._make_pod(job, following)
        elif ended == spec["completions"] and gone:
            self._finish(job, "Failed", "FailedIndexes", "Job has failed indexes")
        elif ended == spec["completions"]:
            self._finish(job, "Complete", "CompletionsReached", "")

    def _finish(self, job, kind, reason, message):
        condition = {"type": kind, "status": "True", "reason": reason, "message": message}
        job["status"].setdefault("conditions", []).append(condition)
        if kind == "Failed":
            self._tell(job, reason, message)
        self._end_pods(job)
        parent = next(iter(job["metadata"].get("ownerReferences", [])), None)
        jobset = parent and self._find("jobsets", job["metadata"]["namespace"], parent["name"])
        if jobset:
            self._child_ended(jobset, job, condition)

    def _tell(self, job, reason, message):
        place = {"kind": "Job", "name": job["metadata"]["name"], "uid": job["metadata"]["uid"]}
        event = {
            "apiVersion": "v1", "kind": "Event", "type": "Warning", "reason": reason,
            "message": message, "involvedObject": place, "lastTimestamp": now(),
            "metadata": {
                "name": f"{place['name']}.{secrets.token_hex(4)}",
                "namespace": job["metadata"]["namespace"],
            },
        }  # fmt: skip
        self._store("events", event)

    def _start_child(self, jobset):
        replicated = jobset["spec"]["replicatedJobs"][0]
        name = jobset["metadata"]["name"]
        child = {
            "apiVersion": "batch/v1", "kind": "Job",
            "metadata": {
                "name": f"{name}-{replicated['name']}-0",
                "namespace": jobset["metadata"]["namespace"],
                "labels": {
                    "jobset.sigs.k8s.io/jobset-name": name,
                    "jobset.sigs.k8s.io/jobset-uid": jobset["metadata"]["uid"],
                    "jobset.sigs.k8s.io/restart-attempt": str(jobset["status"]["restarts"]),
                },
                "ownerReferences": [owner(jobset)],
            },
            "spec": copy.deepcopy(replicated["template"]["spec"]),
        }  # fmt: skip
        self._store("jobs", child)
        self._made("jobs", child)

    def _child_ended(self, jobset, child, condition):
        policy = jobset["spec"]["failurePolicy"]
        if condition["type"] == "Complete":
            jobset["status"]["conditions"] = [{"type": "Completed", "status": "True"}]
            return
        action = "RestartJobSet"
        for rule in policy.get("rules", []):
            patterns = rule.get("onJobFailureMessagePatterns", [""])
            if condition["reason"] in rule["onJobFailureReasons"] and any(
                re.search(p, condition["message"]) for p in patterns
            ):
                action = rule["action"]
                break
        counted = jobset["status"].get("counted", 0)
        if action == "FailJobSet" or (
            action == "RestartJobSet" and counted >= policy["maxRestarts"]
        ):
            jobset["status"]["conditions"] = [{**condition, "type": "Failed"}]
            return
        jobset["status"] |= {
            "counted": counted + (action == "RestartJobSet"),
            "restarts": jobset["status"]["restarts"] + 1,
        }
        self._forget("jobs", child)
        self._start_child(jobset)

    def _end_pods(self, owner):
        for pod in self.pods():
            if any(
                r["uid"] == owner["metadata"]["uid"] for r in pod["metadata"]["ownerReferences"]
            ):
                self._delete_pod(pod)

    def _delete_pod(self, pod, *, disrupted=False):
        """Sends SIGTERM; a pod without a process ends at once."""
        if pod["status"]["phase"] in ("Succeeded", "Failed"):
            return
        pod["metadata"]["deletionTimestamp"] = now()
        if self.kubelet:
            self.kubelet.stop(pod)
        else:
            self.end(pod, 143, disrupted=disrupted)
