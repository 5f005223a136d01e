"""``python -m train``, and the same after ``torchrun -m`` and ``accelerate launch -m``."""

import atexit
import os
import sys
from collections.abc import Sequence

_code: int | None = None


def run(argv: Sequence[str] | None = None, prog: str = "python -m train") -> int:
    """Runs a command and returns its exit code, which the caller must exit with at once.

    Call it before anything registers functions with ``atexit``: see ``_exit_without_teardown``.
    """
    global _code
    # Registered first, so it is called last; threads are joined before.
    atexit.register(_exit_without_teardown)

    from train.exits import Exit
    from train.process.stop_signals import end_at_stop_signals

    end_at_stop_signals()  # before slow imports
    try:
        from train.cli import main

        _code = main(argv, prog)
    except KeyboardInterrupt:  # during an import
        print("isorun: stopped.", file=sys.stderr)
        _code = Exit.STOPPED_AT_ONCE
    return _code


def _exit_without_teardown() -> None:
    """Exits one of several processes without tearing down the interpreter.

    Threads of gloo and NCCL live until the process ends. One that requests the interpreter's lock
    during teardown is killed inside C++ code that must not unwind, and takes the process with it
    ("terminate called without an active exception"): SIGABRT after a successful run. All other
    exit functions have been called by now.
    """
    if _code is not None and os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_code)


if __name__ == "__main__":
    sys.exit(run())
