"""``python -m train``, also after ``torchrun -m`` and ``accelerate launch -m``, and by path.

Started by the path of this file, it runs this very package; ``python -m train`` would run a
``train.py`` of the working directory instead. Processes that isorun starts itself use the path.
"""

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

    from train.cli import main

    _code = main(argv, prog)
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


def _import_this_package() -> None:
    """Makes ``import train`` find the package of this file, wherever it is and whatever else is
    on the path, and removes the package's own directory from the path."""
    package = os.path.dirname(os.path.realpath(__file__))  # noqa: PTH120 - no imports before run
    root = os.path.dirname(package)  # noqa: PTH120
    sys.path[:] = [path for path in sys.path if os.path.realpath(path or ".") != package]
    known = root in sys.path
    sys.path.insert(0, root)
    import train  # noqa: F401

    del sys.path[0]
    if not known:
        sys.path.append(root)


if __name__ == "__main__":
    if not __package__:
        _import_this_package()
    sys.exit(run())
