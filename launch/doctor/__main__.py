"""``python -m launch.doctor``, alone or as the workers of an agent."""

import os
import sys

from launch.doctor.cli import main

if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a check that hangs, or a thread of gloo's or NCCL's, must not keep it alive
