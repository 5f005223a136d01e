"""Write one HTML file about one or several runs: curves, time line, samples, config.

The file opens without a network. With --watch it is served on this machine while the runs train.
"""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path

from train.command_line import say
from train.exits import Exit, UsageError
from train.paths import path_word


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the directory of a run")
    parser.add_argument(
        "--to",
        type=path_word,
        metavar="FILE",
        help="output file; default: report.html, or none with --watch",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="serve the report on this machine (127.0.0.1) until the runs have ended",
    )
    parser.add_argument(
        "--port", type=int, metavar="N", help="port for --watch; default: one that is free"
    )


def run(arguments: argparse.Namespace) -> Exit:
    """Writes the report and prints its path, or serves it and prints its address."""
    if arguments.port is not None and not arguments.watch:
        raise UsageError("--port is given without --watch; add --watch, or leave out --port.")
    if arguments.port is not None and not 0 <= arguments.port < 1 << 16:
        raise UsageError(f"--port is {arguments.port}; choose one from 0 to 65535.")
    from train.report.data import read_run
    from train.report.page import render
    from train.report.target import check_target, write_report

    paths = list(dict.fromkeys(arguments.runs))
    target = Path(arguments.to or "report.html")
    if arguments.to or not arguments.watch:
        check_target(target)
    if arguments.watch:
        _watch(paths, arguments.port or 0)
    if arguments.to or not arguments.watch:
        write_report(target, render([read_run(path) for path in paths]))
        say(str(target))
    return Exit.DONE


def _watch(paths: list[str], port: int) -> None:
    from train.report.serve import HOST, open_server, serve

    server = open_server(paths, port)
    say(f"http://{HOST}:{server.server_port}/ until the run has ended, or Ctrl-C")
    with suppress(KeyboardInterrupt):
        serve(server)
