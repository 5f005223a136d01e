"""How tests are shared out between processes (``pytest -n 2``)."""

from pathlib import Path

import pytest

# These take longest; whoever begins with them is not waited for at the end.
LONGEST = (
    "real/docker",
    "real/slurm",
    "test_docs.py",
    "launch/kubernetes/test_pretended.py",
    "real/test_agent_hosts.py",
    "real/test_torchx_local.py",
    "launch/agent/test_agent.py",
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
    items.sort(
        key=lambda item: LONGEST.index(groups[item]) if groups[item] in LONGEST else len(LONGEST)
    )
