"""Whether Weights & Biases can be reached, if the run uses it online."""

from __future__ import annotations

import time
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from launch.contract import first_line, wandb_mode
from launch.doctor.findings import Finding, ok, warning
from launch.doctor.place import Place

CHECK = "W&B"
SECONDS = 3.0


def check(place: Place) -> list[Finding]:
    """Called on rank 0, which alone connects to W&B. Never a failure: a run continues offline."""
    assert place.loaded is not None
    url = place.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    mode = wandb_mode(
        place.loaded.config.track.wandb, place.environ.get("WANDB_MODE") or "online", url, None
    )
    if mode != "online":
        return [ok(CHECK, f"not needed: {mode}")]
    started = time.monotonic()
    try:
        urlopen(Request(url, method="HEAD"), timeout=SECONDS).close()
    except HTTPError:
        pass  # an answer
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        why = first_line(reason) if isinstance(reason, Exception) else str(reason)
        return [
            warning(
                CHECK,
                f"{url} cannot be reached ({why})",
                "fix the network or https_proxy, or set track.wandb=offline; otherwise the run "
                "continues offline, and wandb sync uploads its files later",
            )
        ]
    return [ok(CHECK, f"{url} answers", seconds=round(time.monotonic() - started, 3))]
