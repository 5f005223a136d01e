"""A page as one HTML file, with its styles, its script, uPlot and its data.

Its Content-Security-Policy permits no network access, and only the scripts and styles that are
written here, by their hashes.
"""

from __future__ import annotations

import hashlib
import json
import time
from base64 import b64encode
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from train.report.html import Html, script_json, text
from train.version import __version__

UPLOT = "vendor/uplot"


def document(
    template: str, title: str, parts: Mapping[str, Html], drawn: Mapping[str, Any], *, live: bool
) -> str:
    """The page. ``template``: a file of assets/, with the names of ``parts`` in braces. ``drawn``:
    what the script draws. ``live``: whether it may ask its own server for changes."""
    style = _asset(f"{UPLOT}/uPlot.min.css") + _asset("assets/report.css")
    licence = f"/*!\n{_asset(f'{UPLOT}/LICENSE')}*/\n"
    scripts = [licence + _asset(f"{UPLOT}/uPlot.iife.min.js"), _asset("assets/report.js")]
    connect = "'self'" if live else "'none'"
    policy = (
        f"default-src 'none'; script-src {' '.join(_hash(script) for script in scripts)}; "
        f"style-src {_hash(style)}; img-src data:; connect-src {connect}; "
        "base-uri 'none'; form-action 'none'"
    )
    made = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    values = {
        "policy": text(policy),
        "title": text(f"{title} · isorun report"),
        "heading": text(title),
        "made": text(f"Made {made} by isorun {__version__}"),
        "style": style,
        "data": script_json({**drawn, "live": live}),
        "uplot": scripts[0],
        "script": scripts[1],
        "library": text(json.loads(_asset(f"{UPLOT}/vendor.json"))["version"]),
        **parts,
    }
    page, *rest = _asset(f"assets/{template}").split("{{")
    for piece in rest:
        name, _, after = piece.partition("}}")
        page += values[name] + after
    return page


@cache
def _asset(name: str) -> str:
    return files("train.report").joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return f"'sha256-{b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
