"""The metric by which a run is judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PREFIX = "eval/"
"""Begins the names of evaluation metrics where they are logged."""


def watched_metric(config: Mapping[str, Any]) -> tuple[str, str]:
    """The metric of ``checkpoint.keep_best``, else of ``early_stop``, else the loss, as it is
    logged (``eval/loss``), and whether its smallest or largest value is best (min or max)."""
    checkpoint = config.get("checkpoint")
    keep_best = checkpoint.get("keep_best") if isinstance(checkpoint, Mapping) else None
    for rule in (keep_best, config.get("early_stop")):
        if isinstance(rule, Mapping) and isinstance(rule.get("metric"), str) and "mode" in rule:
            return f"{PREFIX}{rule['metric']}", "max" if rule["mode"] == "max" else "min"
    return f"{PREFIX}loss", "min"
