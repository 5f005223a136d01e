"""Print the Kubernetes objects of a run, for `kubectl apply -f -`.

The first name is an overlay in k8s/, and further names are components to add to it. Or the first
name is a TorchX component of isorun, followed by its arguments: this prints what the scheduler
kubernetes_job would submit. Warnings go to standard error.
"""

from __future__ import annotations

import argparse

from launch.contract import Exit, log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.usage = (
        "%(prog)s OVERLAY [COMPONENT ...] [--set KEY=VALUE ...] [-- COMMAND ...]\n"
        "       %(prog)s isorun.fit [--cfg KEY=VALUE,...] [ARGUMENT ...]"
    )
    parser.add_argument(
        "names", nargs=argparse.REMAINDER, metavar="NAME", help="an overlay, then components"
    )


def run(arguments: argparse.Namespace) -> Exit:
    """Renders and prints. Raises UsageError."""
    from launch.kubernetes.command_line import render_words
    from launch.kubernetes.rendering import as_yaml

    rendered = render_words(arguments.names)
    for warning in rendered.warnings:
        log(f"warning: {warning}")
    print(as_yaml(rendered.objects), end="")
    return Exit.DONE
