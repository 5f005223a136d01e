"""``python -m launch.requeue CODE --most N``, for batch files; see docs/slurm.md."""

import sys

from launch.torchx.schedulers.requeue import main

if __name__ == "__main__":
    sys.exit(main())
