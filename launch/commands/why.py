"""Explain why a launch failed: the rank that failed first, its exit code, and what to do.

The sources are the launch log, the failure records in the run directory, and the scheduler; without
a failure record also the end of the job's log.
"""

from __future__ import annotations

import argparse
from typing import Any

from launch.agent.failure import advice
from launch.commands.show import add_run_argument
from launch.contract import Exit, first_line, is_worth_retrying, say
from launch.failure_record import headline
from launch.history.launches import Launch, find_launch
from launch.history.quietly import quietly

_LINES = 10
_SECONDS = 30.0  # within which all agents write their records of one failure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_run_argument(parser)


def run(arguments: argparse.Namespace) -> Exit:
    """Prints it."""
    launch = find_launch(arguments.run_name)
    state = launch.refresh()
    failure = _last(launch.failures())
    say(f"{launch.run_id} on {launch.line['scheduler']}: {_outcome(launch, state)}")
    for note in launch.notes:
        say(f"  {note}")
    if failure:
        _print_failure(failure)
    elif state in {"FAILED", "LOST"}:
        say("There is no failure record on this machine.")
        _print_log(launch)
    code = failure["exit_code"] if failure else launch.exit_code
    if code:
        again = "may succeed" if is_worth_retrying(code) else "would fail again"
        overdue = bool(failure and failure["first"].get("overdue"))
        say(f"What to do: {advice(code, overdue=overdue)}. Another launch of the same run {again}.")
    elif state == "LOST":
        say("What to do: launch it again; it resumes from the last checkpoint.")
    return Exit.DONE


def _last(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The most complete record of the last failure, if there is one.

    Agents that do not hear from each other in time write one record each. A failure that is not
    retryable caused the others; among equals, the record that lists most ranks is complete.
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


def _outcome(launch: Launch, state: str) -> str:
    if state == "SUCCEEDED":
        return "it succeeded."
    if state == "CANCELLED":
        return "it was cancelled."
    if state in {"RUNNING", "PENDING", "SUBMITTED"}:
        return f"it has not ended; its state is {state}."
    return f"{state}{f', exit code {launch.exit_code}' if launch.exit_code else ''}."


def _print_failure(record: dict[str, Any]) -> None:
    first = record["first"]
    say(headline(record))
    for line in str(first["error"]).splitlines() or first["log"][-_LINES:]:
        say(f"  {line}")
    if record["others"]:
        others = ", ".join(f"{x['rank']} ({x['exit_code']})" for x in record["others"][:16])
        say(f"After it: rank {others}")
    if record["lost_nodes"]:
        say(f"No report from node {', '.join(map(str, record['lost_nodes']))}.")


def _print_log(launch: Launch) -> None:
    """The end of the first node's log, if the scheduler still has it."""
    if launch.line["scheduler"] == "local_cwd":
        return  # removed when the command ended
    role = str(launch.line["role"])
    try:
        with quietly():
            from torchx.runner import get_runner

            with get_runner() as runner:
                lines = list(runner.log_lines(launch.handle, role, 0))[-_LINES:]
    except Exception as error:  # the clients of clusters raise many kinds
        say(f"Its log cannot be read: {first_line(error)}.")
        return
    for line in lines:
        say(f"  {line.rstrip()}")
