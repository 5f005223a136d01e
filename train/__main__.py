"""``python -m train``, and the same after ``torchrun -m`` and ``accelerate launch -m``."""

import atexit
import os
import sys


def _leave() -> None:
    """Ends one of several processes without taking the interpreter down.

    gloo's and NCCL's threads live until the process ends. One that wants the interpreter's lock
    while the interpreter goes away is killed inside C++ code that allows no unwinding, and takes
    the process with it ("terminate called without an active exception"): SIGABRT after a run
    that went well. Everything that is to happen at exit has happened by now.
    """
    if code is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    code: int | None = None
    atexit.register(_leave)  # first to be registered, so last to run; threads are joined before

    from train.cli import main

    code = main()
    sys.exit(code)
