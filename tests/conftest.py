"""Assigns tests to lanes and to the processes of ``pytest -n 2``.

``fast``
    ``make test-fast``: tests that start no process. The default, unless ``starts_a_process`` finds
    that a test starts one or the test is marked ``process``. A fast test that starts a process
    fails.
``normal``
    ``make test``: tests that start a process, or that are marked because they take seconds.
``slow``
    ``make test-all``: long runs, and full matrices of which ``make test`` runs a part that covers
    each value. Marked by hand.
``servers``
    ``make test-all``: all of tests/real, which needs an engine, a cluster or network namespaces.
"""

import importlib
import os
import re
import signal
import sys
import tempfile
import time
from itertools import takewhile
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType

import hypothesis
import pytest

from tests.support.fork_client import STARTS

CONTAINERS = "real/containers"
# These take longest, so they start first: otherwise one process works on them alone at the end.
LONGEST = (
    CONTAINERS,
    "real/test_agent_hosts.py",
    "invariants/test_strategies.py",
    "strategies/test_options.py",
    "commands/test_parity.py",
    "launch/kubernetes/test_pretended.py",
    "launch/agent/test_agent.py",
    "launch/doctor/test_nodes.py",
)
# A busy machine is no error.
hypothesis.settings.register_profile("isorun", deadline=None)
hypothesis.settings.load_profile("isorun")

STARTING = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", STARTS}
FORKING = {"fork", "forkpty", "posix_spawn"}
STARTERS = ("subprocess", "multiprocessing", "tests.support.fork_client")


def names_of(code):
    """The global and attribute names that code uses, including those of inner functions."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= names_of(constant)
    return names


def starts_a_process(function, seen):
    """Whether a function uses something that starts processes, directly or through functions and
    classes of the tests. Functions of ``train`` and ``launch`` are not followed."""
    function = getattr(function, "__wrapped__", function)
    if isinstance(function, MethodType):
        function = function.__func__
    if not isinstance(function, FunctionType) or function in seen:
        return False
    seen.add(function)
    names = names_of(function.__code__)
    used = [function.__globals__[name] for name in names if name in function.__globals__]
    modules = [value for value in used if isinstance(value, ModuleType)]
    if any(module.__name__.startswith(STARTERS) for module in modules):
        return True
    inner = [name for name in names if name.startswith(STARTERS) or name in FORKING]
    modules += [importlib.import_module(name) for name in names if name.startswith("tests.")]
    for module in [m for m in modules if m.__name__.startswith("tests.")]:
        used += [vars(module)[name] for name in names if name in vars(module)]
    for value in used:
        if isinstance(value, type) and value.__module__.startswith("tests."):
            used += [method for method in vars(value).values() if isinstance(method, FunctionType)]
    own = [value for value in used if getattr(value, "__module__", "").startswith("tests.")]
    return bool(inner) or any(starts_a_process(value, seen) for value in own)


def fixtures_of(item):
    """The functions of all fixtures that a test uses."""
    found = getattr(item, "_fixtureinfo", None)
    return [d.func for defs in found.name2fixturedefs.values() for d in defs] if found else []


def group(item):
    """The xdist group of a test. Tests of one file share a group because they share fixtures; so do
    those of a directory under real/, which start an engine or a cluster. The image of Docker's tests
    is also that of the cluster."""
    path = item.path.relative_to(Path(__file__).parent)
    if path.parts[:2] in (("real", "docker"), ("real", "kubernetes")):
        return CONTAINERS
    return str(path.parent if path.parts[0] == "real" and len(path.parts) > 2 else path)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    groups = {item: group(item) for item in items}
    for item, name in groups.items():
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(name))
        if name.startswith("real"):
            item.add_marker("servers")
        elif not any(map(item.get_closest_marker, ("normal", "process", "slow"))):
            functions = [getattr(item, "function", None), *fixtures_of(item)]
            started = any(starts_a_process(function, set()) for function in functions)
            item.add_marker("normal" if started else "fast")
    # The longest first; the others of tests/real come last, since they may be skipped for lack of
    # time.
    last = len(LONGEST)
    items.sort(
        key=lambda item: (
            LONGEST.index(groups[item])
            if groups[item] in LONGEST
            else last + groups[item].startswith("real")
        )
    )


def pytest_make_parametrize_id(val):
    """Shortens the names of tests with long texts, of up to 100,000 characters."""
    if isinstance(val, str | bytes) and len(val) > 80:
        start = val[:40] if isinstance(val, str) else val[:40].decode("ascii", "backslashreplace")
        return f"{start} ... ({len(val)})".encode("unicode_escape").decode()
    return None


@pytest.hookimpl(wrapper=True)
def pytest_collection_finish(session):
    """Fails where pytest-xdist has not understood the groups (3.8 with pytest 9.2): tests of a file
    would run in both processes, each with its own fixtures, and take twice the time."""
    yield
    groups = getattr(session.config.option, "loadgroup", False)
    if groups and any("@" not in i.nodeid for i in session.items):
        raise pytest.UsageError("pytest-xdist does not group the tests; see pyproject.toml.")


fast = None  # the fast test that is running


def refuse_processes(event, arguments):
    """An audit hook that fails a fast test when it starts a process. git is allowed: it is fast,
    and runs record the version of the code with it."""
    if fast is None or event not in STARTING or os.getpid() != this_process:
        return
    if event == "subprocess.Popen" and Path(arguments[0]).name == "git":
        return
    pytest.fail(f"{fast} is in the fast lane but starts a process: mark it `process`")


this_process = os.getpid()
sys.addaudithook(refuse_processes)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    global fast
    fast = item.nodeid if item.get_closest_marker("fast") else None
    try:
        return (yield)
    finally:
        fast = None


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Notes that a process of pytest-xdist died, for .ci/again: tests of it have not run."""
    if error:
        node.config.cache.set("isorun/died", f"{node.gateway.id}: {error}")


def pytest_runtest_setup(item):
    """Applies the time limit of the whole test run, ISORUN_TESTS_UNTIL (seconds since the epoch).
    Tests that have not started by then fail, because a test that did not run proves nothing. With
    ISORUN_TESTS_MAY_SKIP=1, those that need servers are skipped instead."""
    until = os.environ.get("ISORUN_TESTS_UNTIL")
    if until and time.time() > float(until):
        late = "the time for all tests together is used up (ISORUN_TESTS_UNTIL)"
        if os.environ.get("ISORUN_TESTS_MAY_SKIP") == "1" and item.get_closest_marker("servers"):
            pytest.skip(late)
        pytest.fail(late, pytrace=False)


@pytest.fixture
def tmp_path(request, tmp_path_factory):
    """A directory of the test. pytest's own looks through those of all tests before for a number."""
    name = re.sub(r"\W", "_", request.node.name)[:30]
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=tmp_path_factory.getbasetemp()))


@pytest.fixture(autouse=True)
def _signals_of_one_test():
    """Handles signals as before the test. Commands that a test calls in this process change that for
    good, and a later test that signals itself would end the process."""
    from train.process.stop_signals import STOP_SIGNALS

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    file = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(file, warn_on_full_buffer=False)
    yield
    signal.set_wakeup_fd(file, warn_on_full_buffer=False)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _modules_of_one_test(tmp_path_factory):
    """Forgets the modules that a test has written and imported, which the next test would get for
    its own of the same name."""
    last = next(reversed(sys.modules))
    yield
    written = str(tmp_path_factory.getbasetemp())
    for name in list(takewhile(lambda name: name != last, reversed(sys.modules))):
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(written):
            del sys.modules[name]
