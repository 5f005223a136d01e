"""The training's config: its batch, and whether all nodes have the same one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from launch.contract import BatchPlan, LoadedConfig
from launch.doctor.checks.versions import usual_values
from launch.doctor.findings import Finding, misconfigured, ok
from launch.doctor.place import Place

CHECK = "config"


def batches(place: Place) -> list[Finding]:
    """Whether the batch can be divided among the ranks; a RunError if not."""
    assert place.loaded is not None
    plan = BatchPlan.from_config(place.loaded.config.batch, place.world.world_size)
    return [
        ok(
            CHECK,
            f"valid for {plan.world_size} rank(s): micro-batch "
            f"{plan.micro_batch_size or plan.largest_micro_batch} x accumulation "
            f"{plan.accumulation}, global batch {plan.global_batch_size}",
        )
    ]


def digest(loaded: LoadedConfig | None) -> str | None:
    """Identifies a resolved config; None without one."""
    if loaded is None:
        return None
    text = json.dumps(loaded.values(), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def compare(digests: Mapping[str, str | None]) -> list[Finding]:
    """A failure for each node whose config differs from that of most nodes."""
    known = {node: digest for node, digest in digests.items() if digest is not None}
    usual = usual_values({node: {CHECK: digest} for node, digest in known.items()})
    return [
        misconfigured(
            CHECK,
            f"the resolved config has the digest {digest}, elsewhere {usual[CHECK]}",
            "give all nodes the same config files, and the same environment if they refer to it",
            node=node,
        )
        for node, digest in known.items()
        if digest != usual[CHECK]
    ]
