"""Secrets do not belong into what a scheduler is given: there, many can read them, and for long.

A component does not know where its job will go. So it withholds secrets: what TorchX hands on is
a placeholder. isorun's local schedulers put the secret back (``launch.schedulers``), its remote
ones refuse the job, and one that nobody has thought of can give away no more than the placeholder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from launch.contract import UsageError

_NAME = re.compile(r".*(_KEY|_TOKEN|_SECRET)|.*PASSWORD.*", re.IGNORECASE)
_HIDDEN = "***"

# What to do instead, by scheduler.
_KUBERNETES = "keep it in a Secret of the cluster, from which the pods take it"
_INSTEAD = {
    "slurm": "leave it out of --env and `export` it before you submit, which Slurm hands down, or "
    "log in once (`wandb login`) on a home directory that the nodes share",
    "kubernetes_job": f"{_KUBERNETES}, as `-cfg components=wandb-secret` does (docs/kubernetes.md)",
    "kubernetes": _KUBERNETES,
    "kubernetes_mcad": _KUBERNETES,
}
_ELSEWHERE = "keep it in the secret store of the cluster and let the job read it from there"


_withheld: dict[str, str] = {}
"""Placeholder to secret, in this process alone."""


def is_secret(name: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    return _NAME.fullmatch(name) is not None


def plaintext(env: Mapping[str, str]) -> list[str]:
    """The variables whose values are secrets, written out."""
    return [name for name, value in env.items() if value and is_secret(name)]


def withhold(env: Mapping[str, str]) -> dict[str, str]:
    """An environment with placeholders for its secrets."""
    placeholders = {}
    for name in plaintext(env):
        placeholders[name] = f"withheld-by-isorun-{name}-{len(_withheld)}"
        _withheld[placeholders[name]] = env[name]
    return {**env, **placeholders}


def restore(env: Mapping[str, str]) -> dict[str, str]:
    """The environment as it was before its secrets were withheld."""
    return {name: _withheld.get(value, value) for name, value in env.items()}


def refuse(env: Mapping[str, str], scheduler: str) -> None:
    """Raises UsageError if a secret would be handed to a scheduler in plain text."""
    for name in plaintext(env):
        raise UsageError(
            f"--env gives {name} in plain text, which everybody could read who may look at jobs "
            f"of {scheduler}; {_INSTEAD.get(scheduler, _ELSEWHERE)}. Local schedulers take it as "
            "it is."
        )


def hide(text: str, environments: Iterable[Mapping[str, str]]) -> str:
    """The text without the secrets of these environments."""
    values = {env[name] for env in environments for name in plaintext(env)}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, _HIDDEN)
    return text
