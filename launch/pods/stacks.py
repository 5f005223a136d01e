"""The stacks of all ranks of a run on a cluster, while it goes on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from launch.contract import (
    STACKS,
    TRAIN,
    Exit,
    RunError,
    UsageError,
    describe_stacks,
    first_line,
    has_fields,
    log,
    parse_object,
    say,
)
from launch.kubernetes import state
from launch.pods.find import ClusterRun
from launch.pods.reader import container_of

_SECONDS = 90.0
"""How long a pod may take to answer, in which a training uses all cores."""
_AT_ONCE = 16
_COMMAND = ["python", "-P", *TRAIN, "stacks", "--json"]


def print_stacks(run: ClusterRun, pods: list[dict[str, Any]], rank: int | None) -> Exit:
    """Prints those of all ranks in the pods, or of one, and what is missing. Raises UsageError if
    there is no such rank."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = list(pool.map(lambda pod: _of_pod(run, pod), pods))
    missing = [each for each in answers if isinstance(each, str)]
    found = [each for answer in answers if not isinstance(answer, str) for each in answer]
    found.sort(key=lambda each: each["rank"])
    chosen = [each for each in found if rank in (None, each["rank"])]
    if found and not chosen and not missing:
        ranks = ", ".join(str(each["rank"]) for each in found)
        raise UsageError(f"--rank is {rank}, but the ranks of {run.label} are {ranks}.")
    if chosen:
        say("\n\n".join(describe_stacks(each) for each in chosen))
    for text in missing:
        log(f"warning: {text}")
    return Exit.RETRY if missing and (rank is None or not chosen) else Exit.DONE


def _of_pod(run: ClusterRun, pod: dict[str, Any]) -> list[dict[str, Any]] | str:
    """The stacks of the ranks in a pod, or why there are none."""
    where = f"node {state.node(pod)} ({pod['metadata']['name']})"
    try:
        said = container_of(run, pod).output(_COMMAND, _SECONDS)
        found = parse_object(f'{{"stacks": {said}}}')["stacks"]
    except (RunError, ValueError) as error:
        return f"{where}: {first_line(error)}"
    if not isinstance(found, list) or not all(has_fields(each, STACKS) for each in found):
        return f"{where}: its answer is not that of this version of isorun."
    return found or f"{where}: no rank is at work; the agent starts them, or waits for other nodes."
