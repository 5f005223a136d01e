"""Files of a learning-rate range test: a picture, a page that needs no network, the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.exits import UsageError
from train.files import replace_text
from train.imports import import_extra
from train.json_text import json_text
from train.process.diagnose import written_to
from train.report.html import Html, join, table, tag, text

_WIDTH, _HEIGHT, _MARGIN = 720, 360, 48
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;"
    "color-scheme:light dark}svg{width:100%;height:auto}td,th{padding:0 1rem;text-align:right}"
)


def write_plots(directory: Path, result: Mapping[str, Any]) -> list[Path]:
    """Writes lr-find.json, lr-find.html and, where matplotlib is installed, lr-find.png.

    ``result`` has the lists ``learning_rate``, ``loss`` and ``smoothed``, the ``suggestion`` and
    its ``reason``. Raises UsageError if the directory cannot be written to.
    """
    paths = [directory / f"lr-find.{kind}" for kind in ("json", "html", "png")]
    with written_to("--to", directory):
        directory.mkdir(parents=True, exist_ok=True)
        replace_text(paths[0], json_text(result) + "\n")
        replace_text(paths[1], _page(result))
        try:
            _draw(paths[2], result)
        except UsageError:  # an extra that is not installed
            return paths[:2]
    return paths


def _draw(path: Path, result: Mapping[str, Any]) -> None:
    import_extra("matplotlib", "plot", "lr-find").use("Agg")
    pyplot = import_extra("matplotlib.pyplot", "plot", "lr-find")
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    rates, suggestion = result["learning_rate"], result["suggestion"]
    axes.plot(rates, result["loss"], linewidth=0.8, alpha=0.5, label="loss")
    axes.plot(rates, result["smoothed"], label="smoothed")
    if suggestion is not None:
        axes.axvline(suggestion, ls="--", color="gray", label=f"suggestion {suggestion:.2g}")
    axes.set(xscale="log", ylim=_range(result["loss"]), xlabel="learning rate", ylabel="loss")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _range(losses: Sequence[float]) -> tuple[float, float]:
    """The part of the losses that a plot shows: what diverges would hide the rest."""
    low, high = min(losses), max(losses)
    return low, min(high, losses[0] + 0.5 * (losses[0] - low) + 1e-12)


def _page(result: Mapping[str, Any]) -> str:
    title, suggestion = "Learning-rate range test", result["suggestion"]
    columns = [result[name] for name in ("learning_rate", "loss", "smoothed")]
    rows = [[f"{value:.5g}" for value in row] for row in zip(*columns, strict=True)]
    body = join(
        [
            tag("h1", title),
            tag("p", result["reason"]),
            tag("p", f"Suggestion: optim.lr={suggestion:.2g}" if suggestion else "No suggestion."),
            _curves(result),
            table("Steps", ["learning rate", "loss", "smoothed"], rows),
        ]
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{text(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style>{body}</html>\n"
    )


def _curves(result: Mapping[str, Any]) -> Html:
    """An SVG drawing; the table below it has the same numbers."""
    rates = [math.log10(rate) for rate in result["learning_rate"]]
    if len(rates) < 2:
        return Html("")
    losses, smoothed = result["loss"], result["smoothed"]
    low, high = _range(losses)

    def x(rate: float) -> float:
        part = (rate - rates[0]) / (rates[-1] - rates[0])
        return _MARGIN + part * (_WIDTH - 2 * _MARGIN)

    def y(loss: float) -> float:
        part = min((loss - low) / ((high - low) or 1.0), 1.0)
        return _HEIGHT - _MARGIN - part * (_HEIGHT - 2 * _MARGIN)

    def line(values: Sequence[float], color: str, width: float) -> Html:
        points = " ".join(f"{x(r):.1f},{y(v):.1f}" for r, v in zip(rates, values, strict=True))
        return tag("polyline", points=points, fill="none", stroke=color, stroke_width=width)

    def label(at_x: float, at_y: float, words: str, anchor: str = "middle") -> Html:
        return tag("text", words, x=f"{at_x:.1f}", y=f"{at_y:.1f}", text_anchor=anchor,
                   fill="currentColor", font_size=13)  # fmt: skip

    parts = [
        line(losses, "#8888", 1),
        line(smoothed, "#2a78d6", 2),
        label(_MARGIN, _HEIGHT - 20, f"{result['learning_rate'][0]:.2g}"),
        label(_WIDTH - _MARGIN, _HEIGHT - 20, f"{result['learning_rate'][-1]:.2g}"),
        label(_WIDTH / 2, _HEIGHT - 6, "learning rate (logarithmic)"),
        label(4, y(high), f"{high:.4g}", "start"),
        label(4, y(low), f"{low:.4g}", "start"),
    ]
    if result["suggestion"] is not None:
        at = f"{x(math.log10(result['suggestion'])):.1f}"
        parts.append(
            tag("line", x1=at, x2=at, y1=_MARGIN / 2, y2=_HEIGHT - _MARGIN, stroke="#d0782a")
        )
    return tag(
        "svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img",
        aria_label="Loss over the learning rate",
    )  # fmt: skip
