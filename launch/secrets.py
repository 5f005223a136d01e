"""Keeps secrets out of what schedulers get: many people can read jobs there, and for a long time.

A component does not know which scheduler gets its job, so it replaces secrets by placeholders.
isorun's local schedulers put the secrets back, its remote schedulers refuse the job, and schedulers
of other packages get the placeholders (``launch.torchx.schedulers``).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence

from launch.contract import (
    HIDDEN,
    UsageError,
    is_secret_value,
    is_secret_variable,
    redact,
    redact_command,
)

# What to do instead, by scheduler.
_KUBERNETES = "store it in a Secret of the cluster, from which the pods read it"
_INSTEAD = {
    "slurm": "`export` it before you submit, since Slurm passes on the environment, or log "
    "in once (`wandb login`) with a home directory that the nodes share",
    "kubernetes_job": f"{_KUBERNETES}, as with `-cfg components=wandb-secret` (docs/kubernetes.md)",
    "kubernetes": _KUBERNETES,
    "kubernetes_mcad": _KUBERNETES,
}
_ELSEWHERE = "store it in the cluster's secret store, from which the job reads it"


_withheld: dict[str, str] = {}
"""Placeholder to secret, in this process only."""


def is_secret(name: str, value: str) -> bool:
    """Whether an environment variable holds a secret, by its name or by the form of its value."""
    return is_secret_variable(name, value) or is_secret_value(value)


def plaintext(env: Mapping[str, str]) -> list[str]:
    """The variables that hold secrets in plain text."""
    return [name for name, value in env.items() if is_secret(name, value)]


def secret_argument(words: Sequence[str]) -> str | None:
    """The first argument of a command that holds a secret, as it may be shown; None without. The
    word after an option such as ``--password`` is one, a reference such as ``$NAME`` is not."""
    for index, shown in enumerate(redact_command(words)):
        if shown != words[index]:
            return f"{words[index - 1]} {shown}" if shown == HIDDEN and index else shown
    return None


def withhold(env: Mapping[str, str]) -> dict[str, str]:
    """An environment with placeholders instead of secrets."""
    placeholders = {}
    for name in plaintext(env):
        placeholders[name] = f"withheld-by-isorun-{name}-{len(_withheld)}"
        _withheld[placeholders[name]] = env[name]
    return {**env, **placeholders}


def restore(env: Mapping[str, str]) -> dict[str, str]:
    """An environment with the secrets in place of their placeholders."""
    return {name: _withheld.get(value, value) for name, value in env.items()}


def refuse(env: Mapping[str, str], arguments: Sequence[str], scheduler: str) -> None:
    """Raises UsageError if an environment or the arguments of a job hold a secret."""
    seen = f"in plain text, readable by everyone who can see jobs of {scheduler}"
    instead = _INSTEAD.get(scheduler, _ELSEWHERE)
    for name in plaintext(restore(env)):
        raise UsageError(
            f"--env gives {name} {seen}; remove it from --env and {instead}. Only local schedulers "
            "accept secrets."
        )
    if argument := secret_argument(arguments):
        raise UsageError(
            f"The command has the argument {argument!r}, which gives a secret {seen}; remove it "
            f"from the command and {instead}. Only local schedulers accept secrets."
        )


def hide(
    text: str,
    environments: Iterable[Mapping[str, str]],
    commands: Iterable[Sequence[str]] = (),
) -> str:
    """The text with the secrets of these environments and commands, and those that their form
    shows, replaced by ``***``."""
    secrets = {env[name]: HIDDEN for env in environments for name in plaintext(env)}
    for words in commands:
        pairs = zip(words, redact_command(words), strict=True)
        secrets.update((word, shown) for word, shown in pairs if word != shown)
    for secret in sorted(secrets, key=len, reverse=True):
        for spelling in _spellings(secret):
            text = text.replace(spelling, secrets[secret])
        if secrets[secret] == HIDDEN and "\n" in secret:  # YAML indents its lines
            for line in filter(lambda line: len(line) > 3, map(str.strip, secret.splitlines())):
                text = text.replace(line, HIDDEN)
    return redact(text)


def _spellings(word: str) -> Iterator[str]:
    """How a request may write a word: as it is, in a shell, in Python and in JSON or YAML, also
    with the ``$`` that TorchX has doubled."""
    for plain in dict.fromkeys((word, word.replace("$$", "$"))):
        yield from dict.fromkeys(
            (shlex.quote(plain), json.dumps(plain)[1:-1], repr(plain)[1:-1],
             plain.replace("'", "''"), plain)
        )  # fmt: skip
