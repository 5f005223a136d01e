"""Runs pods of the small Kubernetes as processes of this machine.

There are no containers, all pods have one address, and the headless service's names in the command
line are replaced. The programs themselves are the real ones.
"""

import os
import re
import signal
import subprocess
import threading
from contextlib import suppress

from tests.support.controllers import INDEX, JOB
from tests.support.forked import quick_python
from tests.support.runs import ROOT, free_port


class Kubelet:
    """Starts and stops processes; ``folder`` contains the volume that they share."""

    def __init__(self, cluster, folder):
        self._cluster, self._folder = cluster, folder
        self.volume, self._app = folder / "runs", folder / "app"
        for made in (self.volume, self._app):
            made.mkdir()
        (self._app / "configs").symlink_to(ROOT / "configs")
        (self._app / "runs").symlink_to(self.volume)
        self._processes, self._ports = {}, {}
        cluster.kubelet = self

    def start(self, pod):
        container, metadata = pod["spec"]["containers"][0], pod["metadata"]
        labels = metadata["labels"]
        port = self._ports.setdefault(labels[JOB], str(free_port()))
        last_words = self._folder / f"{metadata['name']}.log"
        last_words.touch()
        own = {}
        for item in container.get("env", []):
            own[item["name"]] = self._expanded(self._value(item, pod), own)
        own |= {
            "JOB_COMPLETION_INDEX": labels[INDEX],
            "PET_RDZV_PORT": port,
            "PET_TERMINATION_LOG": str(last_words),
        }
        words = [*container.get("command", []), *container.get("args", [])]
        words = [self._local(self._expanded(word, own)) for word in words]
        words = words[2:] if words[:2] == ["tini", "--"] else words
        python, variables = quick_python()
        words[0] = python if words[0] == "python" else words[0]
        process = subprocess.Popen(
            words, cwd=self._app, start_new_session=True, text=True,
            env={**self._environment(), **variables, **own},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._processes[metadata["uid"]] = process
        threading.Thread(target=self._watch, args=(pod, process, last_words), daemon=True).start()

    def stop(self, pod):
        """Sends SIGTERM, and SIGKILL after the grace period."""
        process = self._processes[pod["metadata"]["uid"]]
        process.send_signal(signal.SIGTERM)
        grace = pod["spec"]["terminationGracePeriodSeconds"]
        timer = threading.Timer(grace, self._kill, (process,))
        timer.daemon = True
        timer.start()

    def close(self):
        for process in self._processes.values():
            self._kill(process)

    def _watch(self, pod, process, last_words):
        for line in process.stdout:
            self._cluster.say(pod, line.rstrip("\n"))
        code = process.wait()
        self._kill(process)  # its remaining children
        self._cluster.end(pod, 128 - code if code < 0 else code, last_words.read_text())

    @staticmethod
    def _kill(process):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def _value(self, item, pod):
        if "value" in item:
            return item["value"]
        if key := item["valueFrom"].get("secretKeyRef"):
            secret = self._cluster.objects["secrets", pod["metadata"]["namespace"], key["name"]]
            return secret["stringData"][key["key"]]
        path = item["valueFrom"]["fieldRef"]["fieldPath"]
        if "'" not in path:
            return "127.0.0.1"
        field, key, _ = path.split("'")  # metadata.labels['KEY']
        kind = field.removeprefix("metadata.").rstrip("[")
        return pod["metadata"].get(kind, {}).get(key, "")

    @staticmethod
    def _expanded(word, values):
        return re.sub(r"\$\((\w+)\)", lambda m: values.get(m[1], m[0]), word)

    def _local(self, word):
        """Replaces the host of --rdzv-endpoint=text-0.text:29500 by the loopback address, and /runs
        by the local volume."""
        word = re.sub(r"(--rdzv-endpoint=)[^:]+", r"\g<1>127.0.0.1", word)
        return re.sub(r"(^|=)/runs\b", rf"\g<1>{self.volume}", word)

    @staticmethod
    def _environment():
        kept = {
            k: v for k, v in os.environ.items()
            if not k.startswith(("PET_", "ISORUN_", "WANDB_", "TORCHX", "PYTEST", "KUBE"))
        }  # fmt: skip
        return {
            **kept, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "disabled",
        }  # fmt: skip
