"""Runs pods of the small Kubernetes as processes of this machine, without containers, volumes or
networks: enough for commands of the shell.
"""

import os
import signal
import subprocess
import threading
from contextlib import suppress


class Kubelet:
    """Starts and stops processes."""

    def __init__(self, cluster):
        self._cluster, self._processes = cluster, {}
        cluster.kubelet = self

    def start(self, pod):
        container = pod["spec"]["containers"][0]
        own = {item["name"]: _value(item, pod) for item in container.get("env", [])}
        process = subprocess.Popen(
            container["command"], start_new_session=True, text=True, env={**os.environ, **own},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._processes[pod["metadata"]["uid"]] = process
        threading.Thread(target=self._watch, args=(pod, process), daemon=True).start()

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

    def _watch(self, pod, process):
        for line in process.stdout:
            self._cluster.say(pod, line.rstrip("\n"))
        code = process.wait()
        self._kill(process)  # its remaining children
        self._cluster.end(pod, 128 - code if code < 0 else code)

    @staticmethod
    def _kill(process):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _value(item, pod):
    """The value of a variable that comes from a label or annotation of the pod."""
    field, key, _ = item["valueFrom"]["fieldRef"]["fieldPath"].split("'")  # metadata.labels['KEY']
    kind = field.removeprefix("metadata.").rstrip("[")
    return pod["metadata"].get(kind, {}).get(key, "")
