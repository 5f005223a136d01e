"""The state of a run on a cluster at a glance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from launch.contract import RunError, first_line, parse_object
from launch.kubernetes import state
from launch.kubernetes.notes import notes
from launch.pods.find import ClusterRun
from launch.pods.reader import container_of
from launch.pods.words import files_command

_SECONDS = 60.0
"""How long a pod may take to answer, in which a training uses all cores."""


def overview(run: ClusterRun, directory: str | None = None) -> Iterator[str]:
    """Lines: the state of the workload, why it waits or what failed, each node's newest pod, and
    what the run's own files say."""
    job, pods = run.workload, run.pods()
    workload_state = state.app_state(job, pods).name
    times = state.restarts(job, pods)
    yield f"{run.label}: {workload_state}, a {job['kind']}" + (
        f", restarted {times} time(s)" if times else ""
    )
    text = state.message(job, pods, notes(run.cluster, job, pods))
    yield from (f"  {line}" for line in text.splitlines() if line != "<NONE>")
    for node, pod in sorted({state.node(pod): pod for pod in pods}.items()):
        place = f"{pod['metadata']['name']} on {pod['spec'].get('nodeName') or 'no node'}"
        code = state.exit_code(pod)
        ended = f", exit code {code}" if code is not None else ""
        yield f"  node {node}: {place}, {pod['status'].get('phase')}{ended}"
    if running := run.running_pod(pods=pods):
        yield f"  run: {_files(run, running, directory)}"


def _files(run: ClusterRun, pod: dict[str, Any], directory: str | None) -> str:
    container = container_of(run, pod)
    try:
        said = container.output(files_command(run, ["state"], directory), _SECONDS)
        found = parse_object(f'{{"runs": {said}}}')["runs"]
    except (RunError, ValueError) as error:
        return f"its files cannot be read: {first_line(error)}"
    if not found:
        return "no attempt has written its run directory yet"
    row = found[0]
    parts = [f"{row['id']}, {row['state']}"]
    if row["step"] is not None:
        parts.append(f"step {row['step']} of {row['total_steps'] or 'an unknown number'}")
    if row["last"]:
        parts.append(f"{row['last']['metric']} {row['last']['value']:.4g}")
    if row["age"] is not None:
        parts.append(f"last sign of life {row['age']:.0f} s ago")
    return ", ".join(parts)
