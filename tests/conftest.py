"""How tests are shared out between processes (``pytest -n 2``)."""

import os
import time
from pathlib import Path

import pytest

# These take longest; whoever begins with them is not waited for at the end.
LONGEST = (
    "test_docs.py",
    "launch/kubernetes/test_pretended.py",
    "launch/agent/test_agent.py",
    "launch/doctor/test_nodes.py",
)


def group(item):
    """The tests of a file stay together, since they share what they have set up; so do those of a
    directory under real/, which start an engine or a cluster."""
    path = item.path.relative_to(Path(__file__).parent)
    return str(path.parent if path.parts[0] == "real" and len(path.parts) > 2 else path)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    groups = {item: group(item) for item in items}
    for item, name in groups.items():
        item.add_marker(pytest.mark.xdist_group(name))
    last = len(LONGEST)
    items.sort(
        key=lambda item: (
            LONGEST.index(groups[item])
            if groups[item] in LONGEST
            else last + groups[item].startswith("real")
        )
    )


def pytest_runtest_setup(item):
    """Where all tests together have a time limit, those that need servers give way: they come
    last, and are left out when ISORUN_TESTS_UNTIL (seconds since the epoch) has passed."""
    until = os.environ.get("ISORUN_TESTS_UNTIL")
    if until and time.time() > float(until) and group(item).startswith("real"):
        pytest.skip("the time for all tests together is used up (ISORUN_TESTS_UNTIL)")
