"""The commands that this room runs in pods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launch.agent_command import agent_arguments
from launch.kubernetes import state
from launch.pods.find import ClusterRun
from launch.pods.run_files import MODULE


def files_command(
    run: ClusterRun, action: Sequence[str], directory: str | None = None
) -> list[str]:
    """``python -m launch.pods.run_files ACTION`` in a pod of a run. ``directory``: its run
    directory, instead of that of its command."""
    where = ["--directory", directory] if directory else []
    return ["python", "-P", "-m", MODULE, *action, *where, "--", *training_command(run)]


def training_command(run: ClusterRun) -> list[str]:
    """The command that the agent of a run starts, as it stands in the manifest."""
    template: dict[str, Any] = state.pod_template(run.workload) or {"spec": {"containers": [{}]}}
    main = template["spec"]["containers"][0]
    words = [*(main.get("command") or []), *(main.get("args") or [])]
    found = agent_arguments(words)
    return found[1] if found else words
