"""The arguments of `isorun render`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from launch.contract import Parser, UsageError
from launch.kubernetes import manifests
from launch.kubernetes.rendering import Rendered, RenderRequest, render
from launch.kubernetes.values import parse


def parser() -> Parser:
    """The parser for an overlay's arguments."""
    made = Parser(prog="isorun render", add_help=False)
    made.add_argument("overlay", metavar="OVERLAY")
    made.add_argument("components", nargs="*", metavar="COMPONENT")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    made.add_argument("--without", action="append", default=[], metavar="COMPONENT")
    made.add_argument("-n", "--namespace")
    return made


def render_words(words: Sequence[str]) -> Rendered:
    """The objects of an overlay or of a TorchX component. Raises UsageError."""
    if words and "." in words[0] and not words[0].startswith("-"):
        from launch.kubernetes.component import render_component

        return render_component(words[0], words[1:])
    own, command = list(words), []
    if "--" in own:
        at = own.index("--")
        own, command = own[:at], own[at + 1 :]
    if not own:
        raise UsageError(
            "Nothing to render; give a TorchX component such as isorun.fit, or an overlay: "
            f"{', '.join(manifests.names('overlays'))}."
        )
    given = parser().parse_intermixed_args(own)
    changes = replace(parse(given.set, command), namespace=given.namespace)
    leave_out = [manifests.check("components", name) for name in given.without]
    return render(RenderRequest(given.overlay, changes, given.components, leave_out))
