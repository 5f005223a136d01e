"""``python -m launch.agent.refuse TEXT``: a rank that ends with a usage error.

The agent of a node that cannot start its command starts this instead. So the agents of the other
nodes learn of it as of any failure, and do not wait for a node that will not join.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from launch.contract import UsageError, exit_code_of


def refuse(text: str) -> NoReturn:
    """Raises UsageError with the text."""
    raise UsageError(text)


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: refuse(sys.argv[1])))
