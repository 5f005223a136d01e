"""Renders the objects that ``kubernetes_job`` would submit for a component of isorun."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import TYPE_CHECKING, Any

from launch.contract import UsageError, did_you_mean, first_line, import_extra
from launch.kubernetes.rendering import Rendered

if TYPE_CHECKING:
    from torchx.specs import AppDef, runopts


def render_component(name: str, words: Sequence[str]) -> Rendered:
    """The objects for a component such as ``isorun.fit`` and its arguments; ``--cfg KEY=VALUE,...``
    among them are the scheduler's options. Raises UsageError."""
    import_extra("torchx.specs.builders", "launch", f"render {name}", "render an overlay")

    from launch.kubernetes.scheduler import create_scheduler
    from launch.torchx import components

    known = {f"isorun.{n}": getattr(components, n) for n in ("fit", "doctor", "sweep", "run")}
    if name not in known:
        raise UsageError(
            f"{name!r} is not a component of isorun{did_you_mean(name, known)} The components are "
            f"{', '.join(known)}."
        )
    scheduler = create_scheduler("render")
    given, cfg = _without_cfg(words)
    options = _options(cfg, scheduler.run_opts())
    rendered: Rendered = scheduler.submit_dryrun(
        _app(name, known[name], given), options
    ).request.rendered
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


def _options(cfg: str, known: runopts) -> Any:
    """The scheduler's options, of which TorchX ignores those that it does not know."""
    from torchx.util.types import to_dict

    names = [name for name, _ in known]
    try:
        for name in to_dict(cfg):
            if name not in names:
                raise UsageError(
                    f"--cfg is {cfg!r}, but {name} is not an option{did_you_mean(name, names)} "
                    f"The options are {', '.join(names)}."
                )
        return known.cfg_from_str(cfg)
    except ValueError as error:
        raise UsageError(
            f"--cfg must be KEY=VALUE,..., with numbers where `torchx runopts kubernetes_job` "
            f"says int, but is {cfg!r} ({first_line(error)})."
        ) from None


def _app(name: str, component: Callable[..., AppDef], words: Sequence[str]) -> AppDef:
    """The component's app. TorchX's parser prints its usage and exits after an error."""
    from torchx.specs.builders import materialize_appdef

    output = StringIO()
    try:
        with redirect_stderr(output):
            return materialize_appdef(component, list(words))
    except SystemExit as leaving:
        if not leaving.code:  # --help
            raise
        why = output.getvalue().rpartition("error: ")[2].strip()
    except ValueError as error:  # such as an --env without =
        why = first_line(error)
    raise UsageError(f"{name}: {why}; see `isorun render {name} --help`.")
