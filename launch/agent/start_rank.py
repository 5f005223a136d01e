"""Starts a command that gets SIGTERM when the process that started it dies, even by SIGKILL.

Runs as a script and imports nothing slow: it becomes each rank. Only Linux can do this; on other
systems ranks survive an agent that is killed.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_USAGE = 64  # train.exits.Exit.USAGE, which cannot be imported here


def main() -> None:
    """``start_rank.py PARENT COMMAND ...``: becomes the command, as a child of process PARENT."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(128 + signal.SIGTERM)  # the parent died before prctl took effect
    os.environ.pop("TORCHELASTIC_SIGNALS_TO_HANDLE", None)  # for the agent only, see elastic.py
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(
            f"isorun: error: {command[0]!r} cannot be started: {error.strerror}.", file=sys.stderr
        )
        sys.exit(_USAGE)


if __name__ == "__main__":
    main()
