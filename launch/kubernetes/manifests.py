"""Reads the templates under k8s/: overlays and components."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from launch.contract import UsageError, did_you_mean

RUN = "run"  # the component that applies the values of run.yaml
CLAIMS = ("pvc", "pvc-single-node")
"""The components with the volume of the runs. One that is added replaces the overlay's, and leaving
one out leaves out any."""


@cache
def root() -> Path:
    """The directory k8s/: in the installed package, or in the source tree."""
    here = Path(__file__).parent
    for place in (here / "k8s", here.parents[1] / "k8s"):
        if (place / "base" / "kustomization.yaml").is_file():
            return place
    raise UsageError(
        f"The Kubernetes templates are neither in {here / 'k8s'} nor in {here.parents[1] / 'k8s'}; "
        "reinstall isorun."
    )


@cache
def names(kind: str) -> list[str]:
    """The names of all overlays or components; ``kind`` is overlays or components."""
    return sorted(p.parent.name for p in (root() / kind).glob("*/kustomization.yaml"))


def check(kind: str, name: str) -> str:
    """Returns the name if it exists. Raises UsageError."""
    if name not in names(kind):
        what = {"overlays": "an overlay", "components": "a component"}[kind]
        raise UsageError(
            f"{name!r} is not {what}{did_you_mean(name, names(kind))} The {kind} are "
            f"{', '.join(names(kind))}."
        )
    return name


@dataclass(frozen=True)
class Overlay:
    """The two files of an overlay."""

    name: str
    kustomization: dict[str, Any]
    run: dict[str, Any]

    @property
    def components(self) -> list[str]:
        """The names of its components, in order."""
        return [Path(path).name for path in self.kustomization["components"]]

    def files(self, config_map: str) -> set[str]:
        """The names of the files in a generated ConfigMap."""
        made = self.kustomization.get("configMapGenerator", [])
        words = [word for m in made if m["name"] == config_map for word in m.get("files", [])]
        return {
            key if equals else Path(key).name
            for key, equals, _ in (w.partition("=") for w in words)
        }


def overlay(name: str) -> Overlay:
    """Reads an overlay. Raises UsageError if there is no such overlay."""
    folder = root() / "overlays" / check("overlays", name)
    return Overlay(name, _read(folder / "kustomization.yaml"), _read(folder / "run.yaml"))


@cache
def needs(component: str) -> frozenset[str]:
    """The values of run.yaml that a component reads."""
    found = _read(root() / "components" / check("components", component) / "kustomization.yaml")
    sources = (item["source"] for item in found.get("replacements", []))
    paths = (s["fieldPath"] for s in sources if s["kind"] == "Run")
    return frozenset(path.removeprefix("spec.") for path in paths if path.startswith("spec."))


@cache
def converts(component: str) -> bool:
    """Whether a component converts the Job to another kind; it must come after all others."""
    found = _read(root() / "components" / check("components", component) / "kustomization.yaml")
    sources = [item["source"] for item in found.get("replacements", [])]
    return any(source.get("fieldPath") == "spec.template" for source in sources)


def _read(path: Path) -> dict[str, Any]:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(values, dict), path
    return values
