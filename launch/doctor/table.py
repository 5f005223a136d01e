"""The findings as a table: with colours on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from launch.contract import Exit, visible
from launch.doctor.findings import Finding, Status, exit_code, one_of_many

_COLOURS = {
    Status.OK: "green",
    Status.WARNING: "yellow",
    Status.FAILED: "bold red",
    Status.SKIPPED: "dim",
}
_MEANING = {
    Exit.DONE: "the run can start",
    Exit.USAGE: "a setting must be changed",
    Exit.RETRY: "the machine, the network or the storage failed",
}


def show(title: str, findings: Sequence[Finding]) -> None:
    """Prints the title, a row for each finding, and the result, on standard output."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    rows = [
        replace(row, node=visible(row.node), text=visible(row.text), advice=visible(row.advice))
        for row in one_of_many(findings)
    ]
    print(title)
    if sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        _coloured(rows)
    else:
        _plain(rows)
    print(result(findings), flush=True)


def result(findings: Sequence[Finding]) -> str:
    """The counts, their meaning and the exit code in one line."""
    counts = Counter(finding.status for finding in findings)
    parts = [f"{counts[status]} {status}" for status in reversed(Status) if counts[status]]
    code = exit_code(findings)
    return f"Result: {', '.join(parts) or 'nothing to check'}; {_MEANING[code]} (exit {code:d})"


def _plain(rows: Sequence[Finding]) -> None:
    check = max((len(row.check) for row in rows), default=0)
    node = max((len(row.node) for row in rows), default=0)
    for row in rows:
        print(f"{row.status:<7}  {row.check:<{check}}  {row.node:<{node}}  {row.text}")
        if row.advice:
            print(f"{'':<7}  {'':<{check}}  {'':<{node}}  -> {row.advice}")


def _coloured(rows: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    for _ in range(3):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        cell = Text(row.text)
        if row.advice:
            cell.append(f"\n-> {row.advice}", "italic")
        table.add_row(Text(row.status, _COLOURS[row.status]), row.check, Text(row.node), cell)
    Console(file=sys.stdout, highlight=False).print(table)
