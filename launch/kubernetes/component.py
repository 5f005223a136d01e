"""Renders the objects that ``kubernetes_job`` would submit for a component of isorun."""

from __future__ import annotations

from collections.abc import Sequence

from launch.contract import UsageError, did_you_mean, import_extra
from launch.kubernetes.rendering import Rendered


def render_component(name: str, words: Sequence[str]) -> Rendered:
    """The objects for a component such as ``isorun.fit`` and its arguments; ``--cfg KEY=VALUE,...``
    among them are the scheduler's options. Raises UsageError."""
    builders = import_extra(
        "torchx.specs.builders", "launch", f"render {name}", "render an overlay"
    )

    from launch.kubernetes.scheduler import create_scheduler
    from launch.torchx import components

    known = {f"isorun.{n}": getattr(components, n) for n in ("fit", "doctor", "sweep", "run")}
    if name not in known:
        raise UsageError(
            f"{name!r} is not a component of isorun{did_you_mean(name, known)} The components are "
            f"{', '.join(known)}."
        )
    given, cfg = list(words), ""
    for at, word in enumerate(given):
        if word == "--":
            break
        if word in ("--cfg", "-cfg") and at + 1 < len(given):
            cfg = given[at + 1]
            del given[at : at + 2]
            break
    scheduler = create_scheduler("render")
    app = builders.materialize_appdef(known[name], given)
    options = scheduler.run_opts().cfg_from_str(cfg)
    rendered: Rendered = scheduler.submit_dryrun(app, options).request.rendered
    return rendered
