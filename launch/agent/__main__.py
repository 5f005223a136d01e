"""``python -m launch.agent [options] -- COMMAND``."""

import sys

from launch.agent.main import main

if __name__ == "__main__":
    sys.exit(main())
