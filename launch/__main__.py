"""``python -m launch``: the same commands as ``isorun``."""

import sys

from launch.cli import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m launch"))
