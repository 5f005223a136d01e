"""``isorun render``: prints or applies the Kubernetes objects of a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from launch.contract import Exit, Parser, UsageError, log
from launch.kubernetes import manifests
from launch.kubernetes.apply import apply
from launch.kubernetes.rendering import Rendered, RenderRequest, as_yaml, render
from launch.kubernetes.values import parse

PROG = "isorun render"
_DESCRIPTION = """\
Print the Kubernetes objects of a run, for `kubectl apply -f -`, or apply them with --apply.
Warnings go to standard error.

OVERLAY is a directory of k8s/overlays, and each COMPONENT one of k8s/components to add to it.
isorun.fit is a TorchX component, and so are isorun.doctor, .sweep, .tune and .run: this prints
what the scheduler kubernetes_job would submit; `%(prog)s isorun.fit --help` lists its arguments.
"""


def main(argv: Sequence[str], prog: str = PROG) -> Exit:
    """Renders and prints or applies. Raises UsageError or RetryError."""
    rendered, applies = _rendered(argv, prog)
    for warning in rendered.warnings:
        log(f"warning: {warning}")
    if applies:
        apply(rendered.objects)
    else:
        print(as_yaml(rendered.objects), end="")
    return Exit.DONE


def parser(prog: str = PROG) -> Parser:
    """The parser for an overlay's arguments."""
    made = Parser(
        prog=prog,
        description=_DESCRIPTION,
        usage=(
            "%(prog)s OVERLAY [COMPONENT ...] [options] [-- COMMAND ...]\n"
            "       %(prog)s isorun.fit [--cfg KEY=VALUE,...] [ARGUMENT ...]"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("overlay", metavar="OVERLAY", help="such as cpu-demo or multi-node")
    made.add_argument("components", nargs="*", metavar="COMPONENT", help="a component to add")
    made.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="a value of run.yaml, name, stopDeadline or env.NAME; repeatable",
    )  # fmt: skip
    made.add_argument(
        "--without", action="append", default=[], metavar="COMPONENT",
        help="a component of the overlay to leave out; repeatable",
    )  # fmt: skip
    made.add_argument("-n", "--namespace", help="the namespace of the objects")
    made.add_argument(
        "--apply", action="store_true",
        help="apply them with kubectl instead of printing them, a TrainJob after its runtime",
    )  # fmt: skip
    return made


def render_words(words: Sequence[str], prog: str = PROG) -> Rendered:
    """The objects of an overlay or of a TorchX component. Raises UsageError."""
    return _rendered(words, prog)[0]


def _rendered(words: Sequence[str], prog: str) -> tuple[Rendered, bool]:
    """The objects, and whether to apply them."""
    if words and "." in words[0] and not words[0].startswith("-"):
        from launch.kubernetes.component import render_component

        return render_component(words[0], words[1:]), False
    own, command = list(words), []
    if "--" in own:
        at = own.index("--")
        own, command = own[:at], own[at + 1 :]
    if not own:
        raise UsageError(
            "Nothing to render; give a TorchX component such as isorun.fit, or an overlay: "
            f"{', '.join(manifests.names('overlays'))}."
        )
    given = parser(prog).parse_intermixed_args(own)
    changes = replace(parse(given.set, command), namespace=given.namespace)
    leave_out = [manifests.check("components", name) for name in given.without]
    request = RenderRequest(given.overlay, changes, given.components, leave_out)
    return render(request), given.apply
