"""A cluster through kubectl; errors contain the state of the cluster.

Runs are watched without kubectl, which takes a quarter of a core if it is started each second.
Commands of isorun run in processes that are forked after the slow imports.
"""

import functools
import json
import os
import re
import subprocess
import time

import yaml
from kubernetes import client, config
from urllib3.exceptions import HTTPError

from launch.kubernetes import checks
from tests.support.forked import Command
from tests.support.kubectl import kubectl

# Timeouts for slow machines; waiting takes this long only in a failing test.
PLACED, SECONDS = 300, 900
POLL = 0.5


def launched(*words, module="launch", **how):
    """Runs `python -m MODULE ...` in the repository; returns its exit code and its output."""
    done = Command(*words, module=module, **how).wait(SECONDS)
    return done.returncode, done.stdout, done.stderr


class Kube:
    """A namespace of the cluster. ``local`` is the cluster if it is on this machine; then ``volume``
    is the directory with the runs."""

    claim = "runs-single-node"  # of the overlay cpu-demo

    def __init__(self, namespace, image, local=None):
        self.namespace, self.image = namespace, image
        self.local, self.volume = local, None

    def create_namespace(self, level):
        """Creates its namespace, with a level of pod security."""
        policy = "pod-security.kubernetes.io"
        labels = {
            f"{policy}/enforce": level,
            f"{policy}/enforce-version": "latest",
            f"{policy}/warn": level,
        }
        metadata = {"name": self.namespace, "labels": labels}
        made = {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}
        self.run("create", "-f", "-", given=yaml.safe_dump(made), namespace=False)

    def delete_namespace(self):
        # The runs first: a namespace whose pods are deleted before their Job can stay forever.
        self.run("delete", "jobs", "--all", "--wait=false", check=False)
        self.run("delete", "namespace", self.namespace, "--wait=false", namespace=False)

    def run(self, *words, given=None, check=True, namespace=True):
        """Runs a kubectl command; returns its standard output."""
        where = ["-n", self.namespace] if namespace else []
        done = subprocess.run(
            [kubectl(), *where, *words], input=given, capture_output=True, text=True, timeout=600
        )
        if check and done.returncode:
            raise AssertionError(f"kubectl {' '.join(words)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout if check else done.stdout + done.stderr

    def get(self, kind, name=None, selector=None, **how):
        """Objects as dictionaries; a single one if ``name`` is given."""
        words = ["get", kind, *([name] if name else []), *(["-l", selector] if selector else [])]
        found = json.loads(self.run(*words, "-o", "json", **how))
        return found if name else found["items"]

    def apply(self, objects):
        self.run("apply", "-f", "-", given=yaml.safe_dump_all(objects))

    def create(self, objects, *options):
        """Creates objects; returns what kubectl prints, also about those that are refused."""
        given = yaml.safe_dump_all(objects)
        return self.run("create", *options, "-f", "-", given=given, check=False)

    # -------------------------------------------------------------------------------- runs

    def objects(self, name, command, *components, nodes=2, values=(), preflight="off"):
        """The objects that `isorun render cpu-demo` makes for a run, with further components and
        values."""
        given = [f"name={name}", f"image={self.image}", f"nodes={nodes}", *values]
        if self.local:  # all nodes have the volume, and more free cores
            components = ("topology-spread", *components)
            given = ["cpu=1", *given]
        return self.rendered(
            "cpu-demo", *components, command=command, values=given, preflight=preflight
        )

    def rendered(self, overlay, *words, command, values, preflight="off"):
        """What `isorun render` makes of an overlay, components and values (``key=value``).
        ``preflight`` is that of the agent: it takes as long as the start of a run."""
        sets = [word for value in values for word in ("--set", value)]
        code, text, said = launched(
            "render", overlay, *words, *sets, "--", *command, env={"ISORUN_KUSTOMIZE": kubectl()}
        )
        assert code == 0, said
        made = list(yaml.safe_load_all(text))
        container = next(pod for _, pod in checks.pods(made))["containers"][0]
        variable = next(v for v in container["env"] if v["name"] == "PET_PREFLIGHT")
        variable["value"] = preflight
        return made

    @functools.cached_property
    def _client(self):
        return config.new_client_from_config(os.environ["KUBECONFIG"])

    def _read(self, api, method, **how):
        answer = getattr(api(self._client), method)(
            namespace=self.namespace, _preload_content=False, _request_timeout=60, **how
        )
        return answer.data.decode()

    def job(self, name):
        return self.get("job", name)

    def jobset(self, name):
        return json.loads(
            self._read(
                client.CustomObjectsApi, "get_namespaced_custom_object", name=name,
                group="jobset.x-k8s.io", version="v1alpha2", plural="jobsets",
            )
        )  # fmt: skip

    def pods(self, name):
        """The pods of a run, the oldest first."""
        selector = f"app.kubernetes.io/instance={name}"
        found = self._read(client.CoreV1Api, "list_namespaced_pod", label_selector=selector)
        return sorted(json.loads(found)["items"], key=lambda p: p["metadata"]["creationTimestamp"])

    def log(self, pod):
        """The log of the only container of a pod, or why there is none."""
        try:
            name = pod["metadata"]["name"]
            return self._read(client.CoreV1Api, "read_namespaced_pod_log", name=name)
        except (client.ApiException, HTTPError) as error:
            return str(error)

    def logs(self, name):
        """The logs of all pods of a run, the oldest pod first. Any pod can have rank 0, because
        torch's rendezvous assigns the ranks."""
        return "".join(self.log(pod) for pod in self.pods(name))

    def until(self, what, condition, name, seconds=SECONDS):
        """Waits for a condition and returns its value. A failure shows everything known about the
        run."""
        deadline = time.monotonic() + seconds
        while True:
            if found := condition():
                return found
            if time.monotonic() > deadline or self._over(name):
                if found := condition():
                    return found
                raise AssertionError(f"{what} was not reached.\n{self.report(name)}")
            time.sleep(POLL)

    def evict(self, pod):
        """Evicts a pod, as when a node is drained."""
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}}
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}/eviction"
        self.run("create", "--raw", path, "-f", "-", given=json.dumps(body), namespace=False)

    def finished(self, name, seconds=SECONDS):
        """Waits for the end of a run; returns (Complete or Failed, the reason)."""

        def ended():
            return self._over(name)

        condition = self.until(f"the end of {name}", ended, name, seconds)
        return condition["type"], condition.get("reason", "")

    def at_step(self, name, step):
        """Waits until the run has reached a step."""
        return self.until(f"step {step} of {name}", lambda: self.step(name) >= step, name)

    def step(self, name):
        found = re.findall(r"^step (\d+)/", self.logs(name), re.MULTILINE)
        return max(map(int, found), default=-1)

    def _over(self, name):
        listed = json.loads(self._read(client.BatchV1Api, "list_namespaced_job"))["items"]
        jobs = [job for job in listed if job["metadata"]["name"] == name]
        for condition in (jobs[0].get("status", {}).get("conditions") or []) if jobs else []:
            if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
                return condition
        return None

    def verify(self, name, config):
        """Verifies the ledger of a run with these words for its config; returns what the command
        prints. In a separate pod, if the volume is not on this machine."""
        if self.volume:
            words = [*config, f"run.dir={self.volume / name}"]
            code, said, errors = launched("verify", *words, module="train")
            assert code == 0, said + errors
            return said
        check = f"{name}-verify"
        command = ["python", "-m", "train", "verify", *config]
        self.apply(self.objects(check, command, nodes=1))
        kind, reason = self.finished(check)
        log = self.logs(check)
        assert kind == "Complete", f"verify ended as {kind} ({reason})\n{self.report(check)}"
        return log

    def report(self, name):
        """The state and the logs, to explain a failure."""
        parts = [f"--- {' '.join(words)}\n{self.run(*words, check=False)}" for words in (
            ("get", "jobs,pods,pvc,svc", "-o", "wide"),
            ("describe", "job", name),
            ("describe", "pods", "-l", f"app.kubernetes.io/instance={name}"),
            ("get", "events", "--sort-by=.lastTimestamp"),
        )]  # fmt: skip
        for pod in self.pods(name):
            log = "\n".join(self.log(pod).splitlines()[-40:])
            parts.append(f"--- the end of the log of {pod['metadata']['name']}\n{log}")
        return "\n".join(parts)


def number(pod):
    return int(pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"])


def exit_code(pod):
    for status in pod["status"].get("containerStatuses", []):
        if ended := status["state"].get("terminated"):
            return ended["exitCode"]
    return None
