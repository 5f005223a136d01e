"""Starts a command that is asked to stop when the process that started it dies, however it dies.

Run as a script, and without imports that cost time: it becomes each rank.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_USAGE = 64  # train.exits.Exit.USAGE, which cannot be imported here


def main() -> None:
    """``tied.py PARENT COMMAND ...``: ties this process to its parent and becomes the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(128 + signal.SIGTERM)  # it died before it could be noticed
    os.environ.pop("TORCHELASTIC_SIGNALS_TO_HANDLE", None)  # the agent's, see elastic.py
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(
            f"isorun: error: {command[0]!r} cannot be started: {error.strerror}.", file=sys.stderr
        )
        sys.exit(_USAGE)


if __name__ == "__main__":
    main()
