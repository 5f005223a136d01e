"""Times and sizes of a run of two pods on a Kubernetes cluster, whose nodes have the image.

    KUBECONFIG=... python -m benchmarks.kubernetes --image isorun:cpu

Times of steps are those of the rows of metrics.jsonl, by the clocks of the nodes. With the option
``--host-path``, a directory that all nodes share holds the runs; else the default storage class
provisions them. With ``--program``, the command that cuts cables of a cluster on this machine, a
node is lost, too.
"""

from __future__ import annotations

import argparse
import json
import re
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.timing import machine, table

_RUN = [
    "--config", "configs/text.yaml", "model.layers=1", "model.width=64", "data.context=64",
    "length.steps=100000", "evaluate.every_steps=null", "track.log_every_steps=1",
    "track.wandb=disabled", "checkpoint.every_steps=20",
]  # fmt: skip
_SECONDS = 600.0


class Namespace:
    """A namespace of its own, with the claim of the overlay cpu-demo."""

    def __init__(self, host_path: Path | None) -> None:
        self.name = f"isorun-bench-{secrets.token_hex(3)}"
        self._volume = self.name if host_path else None
        self.apply({"kind": "Namespace", "metadata": {"name": self.name}})
        if host_path:
            claim = {"namespace": self.name, "name": "runs-single-node"}
            spec = {
                "capacity": {"storage": "100Gi"}, "accessModes": ["ReadWriteMany", "ReadWriteOnce"],
                "claimRef": claim, "hostPath": {"path": str(host_path)},
            }  # fmt: skip
            self.apply({"kind": "PersistentVolume", "metadata": {"name": self.name}, "spec": spec})

    def apply(self, made: dict[str, Any]) -> None:
        """Creates an object of the API group v1."""
        self.kubectl("apply", "-f", "-", given=json.dumps({"apiVersion": "v1", **made}))

    def kubectl(self, *words: str, given: str | None = None, check: bool = True) -> str:
        """What kubectl prints."""
        return subprocess.run(
            ["kubectl", "-n", self.name, *words], input=given, capture_output=True, text=True,
            check=check,
        ).stdout  # fmt: skip

    def get(self, *words: str) -> list[dict[str, Any]]:
        """Objects of the namespace."""
        items: list[dict[str, Any]] = json.loads(self.kubectl("get", *words, "-o", "json"))["items"]
        return items

    def close(self) -> None:
        """Deletes everything, runs first."""
        self.kubectl("delete", "jobs", "--all", check=False)
        self.kubectl("delete", "namespace", self.name, "--wait=false", check=False)
        if self._volume:
            self.kubectl("delete", "pv", self._volume, "--wait=false", check=False)


class Run:
    """A run that TorchX has submitted."""

    def __init__(self, namespace: Namespace, image: str) -> None:
        self._namespace, self.directory = namespace, f"run-{secrets.token_hex(2)}"
        self.submitted = time.time()
        said = _torchx(
            "run", "-s", "kubernetes_job", "--workspace", "",
            "-cfg", f"overlay=cpu-demo,namespace={namespace.name},shared_memory=256Mi,cpu=500m",
            "isorun.fit", "-j", "2x1", "--cpu", "1", "--memMB", "1536", "--max_retries", "3",
            "--image", image, *_RUN, f"run.name={self.directory}",
        )  # fmt: skip
        self.returned = time.time()
        found = re.search(r"kubernetes_job://\S+", said)
        assert found, said
        self.handle = found[0]
        self.name = self.handle.rpartition(":")[2]

    def pods(self) -> list[dict[str, Any]]:
        """Its pods that are not over."""
        found = self._namespace.get("pods", "-l", f"app.kubernetes.io/instance={self.name}")
        return [pod for pod in found if pod["status"]["phase"] in ("Pending", "Running")]

    def running(self) -> list[str]:
        """The names of its running pods, by node of the run."""
        pods = [p for p in self.pods() if p["status"]["phase"] == "Running"]
        return sorted(p["metadata"]["name"] for p in pods)

    def read(self, file: str) -> list[dict[str, Any]]:
        """The lines of a file of the run directory, through a running pod."""
        for pod in self.running():
            said = self._namespace.kubectl(
                "exec", pod, "--", "cat", f"runs/{self.directory}/{file}", check=False
            )
            if said:
                whole = said[: said.rfind("\n") + 1]
                return [json.loads(line) for line in whole.splitlines()]
        return []

    def step_after(self, when: float) -> float:
        """Waits for a step that completed after this time, and returns when it did."""

        def found() -> float | None:
            times = [row["time"] for row in self.read("metrics.jsonl") if row["time"] > when]
            return min(times, default=None)

        return _until(found)


def _torchx(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "torchx.cli.main", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout + done.stderr


def _until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + _SECONDS
    while not (found := condition()):
        if time.monotonic() > deadline:
            sys.exit(f"timed out after {_SECONDS:g} s")
        time.sleep(0.5)
    return found


def started(namespace: Namespace, image: str, times: dict[str, list[float]]) -> Run:
    """A run at its 20th step; adds the times of its start."""
    run = Run(namespace, image)
    _until(lambda: len(run.running()) == 2)
    pods = time.time()
    first = run.step_after(run.submitted)
    times["from torchx run to its return"].append(run.returned - run.submitted)
    times["to both pods running"].append(pods - run.submitted)
    times["to the first step"].append(first - run.submitted)
    _until(lambda: len(run.read("metrics.jsonl")) >= 25)
    return run


def kill(namespace: Namespace, run: Run) -> float:
    """Seconds from the kill of all processes of a pod to the next step."""
    pod = run.running()[1]
    at = time.time()
    namespace.kubectl("exec", pod, "--", "sh", "-c", "kill -9 -1", check=False)
    _until(lambda: pod not in run.running())
    return run.step_after(max(at, _last_step(run, at))) - at


def _last_step(run: Run, at: float) -> float:
    """When the last step of the attempt that was killed completed: the other pod may still have
    finished one."""
    first = [row for row in run.read("attempts.jsonl") if row["time"] > at]
    return float(first[0]["time"]) if first else at + 3.0


def cancel(run: Run) -> tuple[float, float]:
    """Seconds from the cancellation to the end of the run's attempt, and of all pods."""
    at = time.time()
    _torchx("cancel", run.handle)
    _until(lambda: not run.pods())
    over = time.time()
    folder = Path(f"/tmp/{run.name}-attempts.jsonl")
    command = [
        sys.executable,
        "-m",
        "launch",
        "cluster",
        "cp",
        run.handle,
        "attempts.jsonl",
        str(folder),
    ]
    subprocess.run(command, check=True, capture_output=True)
    ended = [json.loads(line) for line in folder.read_text().splitlines()]
    folder.unlink()
    return max(float(row.get("ended", {}).get("time", 0)) for row in ended) - at, over - at


def lose(namespace: Namespace, run: Run, program: str) -> tuple[float, float]:
    """Seconds from the cut of a node to its state NotReady, and to the next step on the others, if
    it is declared out of service at once."""
    pods = namespace.get("pods", "-l", f"app.kubernetes.io/instance={run.name}")
    pod = next(p for p in pods if p["metadata"]["name"] == run.running()[1])
    node = pod["spec"]["nodeName"]
    at = time.time()
    subprocess.run([sys.executable, program, "cut", node], check=True, capture_output=True)
    taint = "node.kubernetes.io/out-of-service=off:NoExecute"
    try:
        _until(lambda: "NotReady" in namespace.kubectl("get", "node", node))
        lost = time.time()
        namespace.kubectl("taint", "node", node, taint)
        _until(lambda: len(run.running()) == 2 and pod["metadata"]["name"] not in run.running())
        step = run.step_after(lost)
    finally:
        subprocess.run([sys.executable, program, "mend", node], check=True, capture_output=True)
        namespace.kubectl("taint", "node", node, f"{taint}-", check=False)
    return lost - at, step - at


def main() -> None:
    """Prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--host-path", type=Path)
    parser.add_argument("--program", help="the command that cuts and mends nodes")
    given = parser.parse_args()
    namespace = Namespace(given.host_path)
    names = (
        "from torchx run to its return", "to both pods running", "to the first step",
        "from a killed pod to the next step", "from torchx cancel to saved",
        "to the end of all pods",
        "from a cut cable to NotReady", "to the next step on the other node",
    )  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in names}
    try:
        for _ in range(given.runs):
            run = started(namespace, given.image, times)
            times[names[3]].append(kill(namespace, run))
            if given.program:
                lost, step = lose(namespace, run, given.program)
                times[names[6]].append(lost)
                times[names[7]].append(step)
            usage = "cat /sys/fs/cgroup/memory.current /sys/fs/cgroup/memory/memory.stat"
            said = [namespace.kubectl("exec", pod, "--", "sh", "-c", usage, check=False)
                    for pod in run.running()]  # fmt: skip
            saved, over = cancel(run)
            times[names[4]].append(saved)
            times[names[5]].append(over)
        kinds = ("job", "service", "secret", "networkpolicy", "configmap")
        selector = f"app.kubernetes.io/instance={run.name}"
        objects = [each for kind in kinds for each in namespace.get(kind, "-l", selector)]
    finally:
        namespace.close()
    rows = [
        [name, f"{statistics.median(found):.1f}", f"{min(found):.1f} to {max(found):.1f}"]
        for name, found in times.items() if found
    ]  # fmt: skip
    print(machine())
    print(table(f"A run of two pods ({given.runs} runs)", ["", "median, s", "range, s"], rows))
    sizes = [[f"{each['kind']}", f"{len(json.dumps(each))}"] for each in objects]
    print(table("Objects of one run", ["kind", "bytes as JSON"], sizes))
    for text in said:
        rss = re.search(r"^(?:total_)?rss (\d+)", text, re.M)
        print(f"memory of a pod: {int((rss and rss[1]) or text.split()[0]) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
