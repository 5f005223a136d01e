"""Runs kustomize, the program itself or the one in kubectl."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from launch.contract import UsageError

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was compiled
VARIABLE = "ISORUN_KUSTOMIZE"
_HOW = (
    "install kubectl 1.27 or newer (https://kubernetes.io/docs/tasks/tools/) or kustomize 5 "
    f"(https://kubectl.docs.kubernetes.io/installation/), or set {VARIABLE} to the path of one"
)


def command() -> list[str]:
    """The start of the command that builds a kustomization. Raises UsageError."""
    named = os.environ.get(VARIABLE)
    for name in (named,) if named else ("kubectl", "kustomize"):
        if found := shutil.which(name):
            return [found, "build" if Path(name).name.startswith("kustomize") else "kustomize"]
    if named:
        raise UsageError(f"{VARIABLE} is {named!r}, which is not a program; correct or unset it.")
    raise UsageError(f"Neither kubectl nor kustomize is installed to build the manifests; {_HOW}.")


def kubectl() -> list[str]:
    """The start of a kubectl command. Raises UsageError."""
    named = os.environ.get(VARIABLE, "")
    for name in [named] * Path(named).name.startswith("kubectl") + ["kubectl"]:
        if found := shutil.which(name):
            return [found]
    raise UsageError(
        "kubectl is not installed, which reaches the cluster; install it "
        "(https://kubernetes.io/docs/tasks/tools/)."
    )


def build(folder: Path) -> list[dict[str, Any]]:
    """The objects of a kustomization. Raises UsageError with kustomize's message."""
    words = command()
    done = subprocess.run([*words, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(
            f"{Path(words[0]).name} could not build the manifests: {_sentence(done.stderr)}; if "
            f"its version is too old, {_HOW}."
        )
    return [values for values in yaml.load_all(done.stdout, _LOADER) if values]


def _sentence(stderr: str) -> str:
    """The last line, without the prefix of kubectl's log, as one line."""
    line = (stderr.strip().splitlines() or ["no error message"])[-1]
    inner = re.search(r'err="(.*)"$', line)
    text = re.sub(r"\\+(n|\")", lambda m: " " if m[1] == "n" else '"', inner[1]) if inner else line
    return text.removeprefix("error: ").rstrip(".")
