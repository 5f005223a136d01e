"""Renders the objects that ``kubernetes_job`` would submit for a component of isorun."""

from __future__ import annotations

from collections.abc import Sequence

from launch.contract import import_extra, log
from launch.kubernetes.rendering import Rendered


def render_component(name: str, words: Sequence[str]) -> Rendered:
    """The objects for a component such as ``isorun.fit`` and its arguments; ``--cfg KEY=VALUE,...``
    among them are the scheduler's options. Raises UsageError."""
    import_extra("torchx.specs.builders", "launch", f"render {name}", "render an overlay")

    from torchx.specs.builders import materialize_appdef

    from launch.kubernetes.scheduler import NAME, create_scheduler
    from launch.torchx import options
    from launch.torchx.words import check_words, component

    function = component(name)
    scheduler = create_scheduler("render")
    given, text = _without_cfg(words)
    cfg = options.parse(text, scheduler.run_opts(), NAME, "--cfg")
    check_words(name, given, command="isorun render")
    app = materialize_appdef(function, given)
    submission = scheduler.submit_dryrun(app, cfg).request
    if submission.code is not None and submission.code.place:
        log(
            f"warning: the pods read the code from {submission.code.place}, where only `torchx "
            "run` stores it, and not `isorun render`."
        )
    rendered: Rendered = submission.rendered
    return rendered


def _without_cfg(words: Sequence[str]) -> tuple[list[str], str]:
    """The component's arguments, and the value of ``--cfg``."""
    given = list(words)
    for at, word in enumerate(given):
        if word == "--":
            break
        option, equals, value = word.partition("=")
        if option in ("--cfg", "-cfg") and (equals or at + 1 < len(given)):
            cfg = value if equals else given[at + 1]
            del given[at : at + (1 if equals else 2)]
            return given, cfg
    return given, ""
