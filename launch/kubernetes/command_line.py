"""What `python -m launch render` is given, read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from launch.contract import UsageError
from launch.kubernetes import manifests
from launch.kubernetes.rendering import Rendered, Request, render
from launch.kubernetes.values import parse


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:]}; see `{self.prog} --help`.")


def parser() -> argparse.ArgumentParser:
    """The arguments of an overlay."""
    made = _Parser(prog="python -m launch render", add_help=False)
    made.add_argument("overlay", metavar="OVERLAY")
    made.add_argument("components", nargs="*", metavar="COMPONENT")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    made.add_argument("--without", action="append", default=[], metavar="COMPONENT")
    made.add_argument("-n", "--namespace")
    return made


def render_words(words: Sequence[str]) -> Rendered:
    """An overlay's objects, or those of a TorchX component. Raises UsageError."""
    if words and "." in words[0] and not words[0].startswith("-"):
        from launch.kubernetes.component import render_component

        return render_component(words[0], words[1:])
    own, command = list(words), []
    if "--" in own:
        at = own.index("--")
        own, command = own[:at], own[at + 1 :]
    if not own:
        raise UsageError(
            f"Name an overlay to render: {', '.join(manifests.names('overlays'))}; or a TorchX "
            "component, such as isorun.fit."
        )
    given = parser().parse_intermixed_args(own)
    changes = replace(parse(given.set, command), namespace=given.namespace)
    leave_out = [manifests.check("components", name) for name in given.without]
    return render(Request(given.overlay, changes, given.components, leave_out))
