"""``python -m launch.agent [options] -- COMMAND``, the same as ``isorun agent``."""

import sys

from launch.agent.main import main

if __name__ == "__main__":
    sys.exit(main())
