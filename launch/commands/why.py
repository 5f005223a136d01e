"""Say why a launch failed: the first failing rank, what its exit code means, and what to do.

Read are the ledger, the failure records in the run directory, and what the scheduler says; and
where there is no record, the end of the job's log.
"""

from __future__ import annotations

import argparse
from typing import Any

from launch.agent.failure import advice
from launch.commands.show import add_run_argument
from launch.contract import Exit, is_worth_retrying
from launch.history.launches import Launch, find
from launch.history.quietly import quietly

_LINES = 10
_SECONDS = 30.0  # within which all agents write what they know of one failure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_run_argument(parser)


def run(arguments: argparse.Namespace) -> Exit:
    """Prints it."""
    launch = find(arguments.run_name)
    state = launch.refresh()
    failure = _last(launch.failures())
    print(f"{launch.run_id} on {launch.line['scheduler']}: {_told(launch, state)}")
    for note in launch.notes:
        print(f"  {note}")
    if failure:
        _print_failure(failure)
    elif state in {"FAILED", "LOST"}:
        print("No failure record can be seen from here.")
        _print_log(launch)
    code = failure["exit_code"] if failure else launch.exit_code
    if code:
        again = "may help" if is_worth_retrying(code) else "would only fail again"
        print(f"What to do: {advice(code)}. The same launch once more {again}.")
    elif state == "LOST":
        print("What to do: launch it again; it goes on from its last checkpoint.")
    return Exit.DONE


def _last(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Of the records of the last failure the one that knows most, if there is any.

    Agents that could not hear each other in time write one each. One whose failure would come
    again explains those that were ended by it; of others, who heard of most ranks knows most.
    """
    if not records:
        return None
    newest = records[-1]
    same = [
        record
        for record in records
        if record.get("round") == newest.get("round") and newest["time"] - record["time"] < _SECONDS
    ]
    same.sort(key=lambda x: (not x["retry"], len(x["others"])))
    return same[-1]


def _told(launch: Launch, state: str) -> str:
    if state == "SUCCEEDED":
        return "it ended well."
    if state == "CANCELLED":
        return "it was cancelled."
    if state in {"RUNNING", "PENDING", "SUBMITTED"}:
        return f"it has not ended; it is {state.lower()}."
    return f"{state}{f', exit code {launch.exit_code}' if launch.exit_code else ''}."


def _print_failure(record: dict[str, Any]) -> None:
    first = record["first"]
    print(f"Rank {first['rank']} on {first['host']} ended first: {record['what']}")
    for line in str(first["error"]).splitlines() or first["log"][-_LINES:]:
        print(f"  {line}")
    if record["others"]:
        others = ", ".join(f"{x['rank']} ({x['exit_code']})" for x in record["others"][:16])
        print(f"After it: rank {others}")
    if record["lost_nodes"]:
        print(f"Nothing was heard of node {', '.join(map(str, record['lost_nodes']))}.")


def _print_log(launch: Launch) -> None:
    """The end of the log of the first node, as far as the scheduler still has it."""
    if launch.line["scheduler"] == "local_cwd":
        return  # it went with the command
    role = str(launch.line["role"])
    try:
        with quietly():
            from torchx.runner import get_runner

            with get_runner() as runner:
                lines = list(runner.log_lines(launch.handle, role, 0))[-_LINES:]
    except Exception as error:  # whatever a cluster's client raises
        print(f"Its log cannot be read either: {error}")
        return
    for line in lines:
        print(f"  {line.rstrip()}")
