"""Starts a command that is asked to stop when the process that started it dies, however it dies.

Run as a script, and without imports that cost time: it becomes each rank.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """``tied.py PARENT COMMAND ...``: ties this process to its parent and becomes the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(128 + signal.SIGTERM)  # it died before it could be noticed
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"isorun: error: {command[0]!r} cannot be started: {error.strerror}.")


if __name__ == "__main__":
    main()
