"""The command line that starts the node agent: written for a launcher, and read back from a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launch.agent.arguments import CODE_NOTES, PREFLIGHTS, Values, parser, variable
from launch.contract import UsageError

AGENT = ("-m", "launch.agent")
"""The arguments of Python that start the agent."""
LEVELS = ("quick", "full")
"""How much the doctor checks."""

__all__ = [
    "AGENT",
    "CODE_NOTES",
    "agent_arguments",
    "max_restarts_option",
    "options_of",
    "preflight_option",
    "variable",
]


def preflight_option(preflight: str) -> list[str]:
    """``--preflight ...``. Raises UsageError."""
    if preflight not in PREFLIGHTS:
        raise UsageError(
            f"--preflight is {preflight!r}, but must be one of {', '.join(PREFLIGHTS)}."
        )
    return ["--preflight", preflight]


def doctor_command(level: str, training: Sequence[str]) -> list[str]:
    """The command that checks for this training command, and never starts it. Raises
    UsageError."""
    if level not in LEVELS:
        raise UsageError(f"--level is {level!r}, but must be one of {', '.join(LEVELS)}.")
    return ["python", "-m", "launch.doctor", "--level", level, "--", *training]


def max_restarts_option(max_restarts: int) -> list[str]:
    """``--max-restarts N``. Raises UsageError."""
    if max_restarts < 0:
        raise UsageError(f"--max_restarts must not be negative, but is {max_restarts}.")
    return ["--max-restarts", str(max_restarts)]


def agent_arguments(words: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """The agent's own options and the command that it runs, from a command line that starts it;
    None for another command line."""
    given = list(words)
    for at in range(len(given) - 1):
        if tuple(given[at : at + 2]) == AGENT:
            own = given[at + 2 :]
            if "--" not in own:
                return own, []
            end = own.index("--")
            return own[:end], own[end + 1 :]
    return None


def options_of(words: Sequence[str], environ: Mapping[str, str]) -> Values | None:
    """The values of the agent's options, from a command line that starts it and the environment it
    gets there; None for another command line. Raises UsageError for an unknown option."""
    found = agent_arguments(words)
    return Values(parser().parse_args(found[0]), environ) if found else None
