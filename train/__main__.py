"""``python -m train``, and the same after ``torchrun -m`` and ``accelerate launch -m``."""

import sys

from train.cli import main

if __name__ == "__main__":
    sys.exit(main())
