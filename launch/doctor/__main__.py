"""``python -m launch.doctor``, the same as ``isorun doctor``, alone or on all ranks."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from launch.doctor.cli import main


def run(argv: Sequence[str] | None = None, prog: str = "python -m launch.doctor") -> NoReturn:
    """Runs the doctor and ends the process, even if a check or a thread of gloo or NCCL hangs."""
    code = main(argv, prog)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
