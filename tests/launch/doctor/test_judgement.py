"""The doctor's findings from given measurements."""

import sys
import threading
import time
from types import SimpleNamespace

import pytest

from launch.doctor import cli, examination, table
from launch.doctor.checks import (
    clocks,
    collectives,
    devices,
    environment,
    interfaces,
    memory,
    network,
    storage,
    versions,
)
from launch.doctor.checks.network import Listener, Reached
from launch.doctor.findings import (
    Status,
    exit_code,
    infrastructure_failure,
    merged,
    misconfigured,
    ok,
    one_of_many,
    warning,
)
from launch.doctor.guard import bounded, bounded_together
from launch.doctor.place import Place
from launch.doctor.rendezvous import Member, Rendezvous
from tests.support.runs import TINY
from train.config.load import load_config
from train.distributed.world import World
from train.exits import DataError, RetryError

ALL = ["a", "b", "c"]


def label(rank):
    return ALL[rank]


def place(*, local_world_size=1, level="quick", **environ):
    world = World(0, local_world_size, 0, local_world_size, "test", "a")
    return Place(world, level, None, environ)


# -- all findings --------------------------------------------------------------------------------


def test_a_wrong_setting_takes_precedence_over_a_failure_and_warnings_do_not_fail():
    assert exit_code([ok("x", ""), warning("x", "", "")]) == 0
    assert exit_code([ok("x", ""), infrastructure_failure("x", "", "")]) == 75
    assert exit_code([infrastructure_failure("x", "", ""), misconfigured("x", "", "")]) == 64


def test_a_table_that_nobody_reads_does_not_change_the_exit_code(monkeypatch, unread):
    """As in ``isorun doctor | head -1``."""
    found = [ok("x", "")]
    monkeypatch.setattr(sys, "stdout", unread)
    monkeypatch.setattr(examination.Examination, "run", lambda self: self.note(found))
    assert cli.main([]) == 0
    found = [misconfigured("x", "", "")]
    assert cli.main([]) == 64


def test_equal_findings_of_several_nodes_are_one_row():
    same = [ok("x", "well", node=node) for node in ALL]
    odd = infrastructure_failure("x", "ill", "", node="b")
    rows = merged(
        [
            *same,
            odd,
            infrastructure_failure("y", "ill", "", node="a"),
            infrastructure_failure("y", "ill", "", node="c"),
        ],
        ALL,
    )
    assert [(row.check, row.node) for row in rows] == [
        ("x", "all nodes"),
        ("x", "b"),
        ("y", "a, c"),
    ]


def test_of_many_healthy_nodes_one_row_is_shown_and_every_failure():
    rows = [ok("x", f"{n} GiB", node=str(n)) for n in range(9)] + [
        infrastructure_failure("x", "0 GiB", "", node="z")
    ]
    shown = one_of_many(rows)
    assert [row.node for row in shown] == ["0", "z"]
    assert "and 8 more nodes passed" in shown[0].text


def test_a_check_that_hangs_or_raises_is_a_finding_and_does_not_delay_others():
    def raises():
        raise ValueError("no such thing")

    def refuses(error):
        raise error

    checks = [
        ("hangs", lambda: threading.Event().wait() and []),
        ("raises", raises),
        ("data", lambda: refuses(DataError("The data is bad."))),
        ("retry", lambda: refuses(RetryError("The disk is gone."))),
        ("fine", lambda: [ok("fine", "well")]),
    ]
    found = bounded_together(checks, 0.5)
    assert [f.check for f in found] == [name for name, _ in checks]
    assert "timed out after 0.5 s" in found[0].text
    assert "ValueError: no such thing" in found[1].text
    assert [int(f.code) for f in found] == [75, 75, 64, 75, 0]
    assert bounded("fine", checks[-1][1], 1.0)[0].status is Status.OK


def test_a_rank_that_did_not_answer_is_not_waited_for_again():
    from torch.distributed import HashStore

    from launch.contract import Messages, Signer

    members = [Member(rank, rank, "host", True) for rank in range(2)]
    rendezvous = Rendezvous(Messages(HashStore(), Signer()), 0, members)
    assert rendezvous.nodes == ["host (node 0)", "host (node 1)"]
    assert rendezvous.collect("first", [0, 1], 0.1) == {}
    rendezvous.publish("second", 5)
    assert rendezvous.lost == {0: "first", 1: "first"}
    rendezvous.lost.pop(0)
    assert rendezvous.collect("second", [0, 1], 3600.0) == {0: 5}


# -- versions and devices ------------------------------------------------------------------------


def test_the_node_that_differs_is_named_even_if_it_is_the_first():
    nodes = {"a": {"torch": "2.1"}, "b": {"torch": "2.2"}, "c": {"torch": "2.2", "more": "1"}}
    found = versions.compare(nodes)
    assert [(f.node, f.text) for f in found] == [
        ("a", "torch is 2.1, elsewhere 2.2"),
        ("c", "more is 1, elsewhere none"),
    ]


GPUS = {"count": 8, "kinds": "8 x H100", "cuda": "12.8", "driver": "570.1"}


def test_devices_that_differ_between_nodes():
    nodes = {"a": GPUS, "b": {**GPUS, "count": 7, "kinds": "7 x H100"}, "c": GPUS}
    (found,) = devices.compare(nodes)
    assert found.node == "b"
    assert "kinds is 7 x H100, elsewhere 8 x H100" in found.text
    assert devices.compare({"a": GPUS, "b": GPUS}) == []


@pytest.mark.parametrize(
    ("processes", "change", "code", "said"),
    [
        (8, {}, 0, "8 x H100, driver 570.1, CUDA 12.8"),
        (9, {}, 64, "9 processes, but 8 GPU(s)"),
        (4, {}, 0, "4 of the GPUs have no process"),
        (8, {"count": 0, "kinds": "cpu"}, 75, "torch (CUDA 12.8) finds no GPU"),
        (2, {"count": 0, "cuda": "none"}, 0, "no GPU, 2 process(es) on the CPU"),
        (2, {"count": 0, "driver": "none"}, 0, "no GPU, 2 process(es) on the CPU"),
    ],
)
def test_processes_and_devices(processes, change, code, said):
    (found,) = devices.check(place(local_world_size=processes), {**GPUS, **change})
    assert int(found.code) == code
    assert said in found.text


@pytest.mark.parametrize(("launcher", "code"), [("srun", 0), ("unknown", 0), ("torchrun", 64)])
def test_a_launcher_may_show_each_process_its_own_device(launcher, code):
    """As Slurm's --gpus-per-task=1."""
    where = Place(World(0, 4, 0, 4, launcher, "a"), "quick", None, {"CUDA_VISIBLE_DEVICES": "0"})
    (found,) = devices.check(where, {**GPUS, "count": 1, "kinds": "1 x H100"})
    assert int(found.code) == code
    assert "4 processes" in found.text


def test_ranks_with_the_same_device():
    assert collectives.same_gpu(["GPU-a", "GPU-b"]) == []
    (found,) = collectives.same_gpu(["GPU-a", "GPU-b", "GPU-b"])
    assert int(found.code) == 64
    assert found.text == "ranks 1, 2 have the same GPU (GPU-b)"


def test_devices_hidden_by_the_user_are_not_a_failure():
    (found,) = devices.check(place(CUDA_VISIBLE_DEVICES=""), {**GPUS, "count": 0})
    assert found.status is Status.OK
    assert "CUDA_VISIBLE_DEVICES is ''" in found.text


# -- environment ---------------------------------------------------------------------------------

THERE = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"], "eth1": ["10.0.1.1"], "ib0": []}


@pytest.mark.parametrize(
    ("variable", "value", "chosen"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", ["eth0"]),
        ("GLOO_SOCKET_IFNAME", "eth", []),
        ("GLOO_SOCKET_IFNAME", "eth0,eth7", []),
        ("NCCL_SOCKET_IFNAME", "eth", ["eth0", "eth1"]),
        ("NCCL_SOCKET_IFNAME", "=eth0", ["eth0"]),
        ("NCCL_SOCKET_IFNAME", "=eth", []),
        ("NCCL_SOCKET_IFNAME", "^lo,ib", ["eth0", "eth1"]),
        ("NCCL_SOCKET_IFNAME", "^=eth0", ["lo", "eth1", "ib0"]),
        ("NCCL_SOCKET_IFNAME", "eno1", []),
    ],
)
def test_the_interfaces_selected_by_a_variable(variable, value, chosen):
    assert interfaces.choose(variable, value, THERE) == chosen


def test_several_processes_without_omp_num_threads(monkeypatch):
    monkeypatch.setattr(environment, "usable_cores", lambda: 8.0)
    (found,) = environment.threads(place(local_world_size=4))
    assert found.status is Status.WARNING
    assert found.text == "4 x 8 threads (by default) on 8 cores"
    assert found.advice == "set OMP_NUM_THREADS to 2"
    (found,) = environment.threads(place(local_world_size=4, OMP_NUM_THREADS="two"))
    assert int(found.code) == 64


@pytest.fixture(autouse=True)
def _small_processes(monkeypatch):
    """The check and the agent need no memory themselves, but where a test says so."""
    monkeypatch.setattr(memory, "memory_of_check", lambda: (0, 0))


@pytest.mark.parametrize(
    ("limit", "used", "check", "agent", "code"),
    [
        (512, 320, 200, 100, 64),  # with the agent it never suffices
        (612, 400, 200, 100, 75),
        (612, 300, 200, 100, None),  # when the check has ended
        (611, 300, 200, 100, 64),
    ],
)
def test_the_agent_keeps_its_memory_and_the_check_gives_its_own_back(
    tmp_path, monkeypatch, limit, used, check, agent, code
):
    own = cgroup_tree(tmp_path, 2, {".": (limit, used, 0)})
    monkeypatch.setattr(memory, "memory_of_check", lambda: (check << 20, agent << 20))
    found = memory.memory(place(local_world_size=1), tmp_path, own)
    assert [int(f.code) for f in found if f.code] == ([code] if code else [])


@pytest.mark.parametrize(
    "names",
    [("memory.max", "memory.current"),
     ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")],
)  # fmt: skip
def test_the_memory_limit_of_a_container(tmp_path, names):
    (tmp_path / "memory").mkdir()
    (tmp_path / names[0]).write_text(f"{1 << 30}\n")
    (tmp_path / names[1]).write_text(f"{1 << 29}\n")
    found = memory.memory(place(local_world_size=2), tmp_path)
    assert found[0].text.startswith("512 MiB free of 1.0 GiB (the container's memory limit)")
    assert int(found[0].code) == 75, "others use it: they may end"
    found = memory.memory(place(local_world_size=4), tmp_path)
    assert int(found[0].code) == 64, "the limit itself is too low"
    assert "raise the container's memory limit" in found[0].advice
    assert not [f for f in memory.memory(place(), tmp_path) if f.code]


@pytest.mark.parametrize(
    ("names", "key"),
    [
        (("memory.max", "memory.current"), "inactive_file"),
        (
            ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
            "total_inactive_file",
        ),
    ],
)
def test_memory_of_cached_files_counts_as_free(tmp_path, names, key):
    (tmp_path / "memory").mkdir()
    (tmp_path / names[0]).write_text(f"{1 << 30}\n")
    (tmp_path / names[1]).write_text(f"{(1 << 30) - 4096}\n")
    stat = (tmp_path / names[0]).with_name("memory.stat")
    stat.write_text(f"anon 1\n{key} {1 << 30}\nactive_file 2\n")
    assert not [f for f in memory.memory(place(), tmp_path) if f.code]
    stat.write_text("anon 1\n")
    assert [int(f.code) for f in memory.memory(place(), tmp_path) if f.code] == [75]


def cgroup_tree(root, version, levels):
    """Cgroups below each other: {path: (limit, used, inactive files)}, in MiB; returns the file
    that names the lowest one as that of this process."""
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    for path, (limit, used, inactive) in levels.items():
        place = root / ("memory" if version == 1 else "") / path
        place.mkdir(parents=True, exist_ok=True)
        unlimited = "max" if version == 2 else (1 << 63) - 4096
        (place / names[0]).write_text(f"{unlimited if limit is None else limit << 20}\n")
        (place / names[1]).write_text(f"{used << 20}\n")
        (place / "memory.stat").write_text(f"anon 1\n{names[2]} {inactive << 20}\n")
    own = root / "self"
    lowest = list(levels)[-1]
    own.write_text(f"4:memory:/{lowest}\n3:cpu:/\n" if version == 1 else f"0::/{lowest}\n")
    return own


@pytest.mark.parametrize("version", [1, 2])
def test_the_limits_of_the_ancestors_of_a_cgroup_count(tmp_path, version):
    """As in a pod with several containers, or a Slurm job with several steps."""
    levels = {
        "job": (1024, 900, 300),
        "job/step": (None, 400, 0),
        "job/step/task": (2048, 100, 0),
    }
    own = cgroup_tree(tmp_path, version, levels)
    (found,) = memory.memory(place(local_world_size=2), tmp_path, own)
    assert found.text.startswith("424 MiB free of 1.0 GiB (the container's memory limit)")
    assert int(found.code) == 75
    (found,) = memory.memory(place(local_world_size=4), tmp_path, own)
    assert int(found.code) == 64, "the limit itself is too low"
    cgroup_tree(tmp_path, version, {"job": (1024, 900, 900), "job/step/task": (2048, 100, 0)})
    assert not [f for f in memory.memory(place(local_world_size=1), tmp_path, own) if f.code]


def test_a_limit_above_the_container_s_cgroup_that_only_memory_stat_shows(tmp_path):
    own = cgroup_tree(tmp_path, 1, {".": (None, 300, 100)})
    with (tmp_path / "memory" / "memory.stat").open("a") as stat:
        stat.write(f"hierarchical_memory_limit {600 << 20}\n")
    (found,) = memory.memory(place(local_world_size=1), tmp_path, own)
    assert found.text.startswith("400 MiB free of 600 MiB (the container's memory limit)")


def test_a_cgroup_of_the_host_that_a_container_does_not_see(tmp_path):
    """/proc/self/cgroup has a path of the host, and the container's own cgroup is the root."""
    own = cgroup_tree(tmp_path, 2, {".": (2048, 100, 0)})
    own.write_text("0::/../../kubepods/pod1\n0::/kubepods/pod1\n")
    (found,) = memory.memory(place(), tmp_path, own)
    assert found.text.startswith("1.9 GiB free of 2.0 GiB")


def test_a_machine_without_limit_and_with_too_little_memory(monkeypatch, tmp_path):
    machine = SimpleNamespace(total=1 << 30, available=1 << 29)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: machine)
    found = memory.memory(place(local_world_size=4), tmp_path)
    assert int(found[0].code) == 64
    assert "use a node with more memory" in found[0].advice
    found = memory.memory(place(local_world_size=2), tmp_path)
    assert int(found[0].code) == 75


# -- between nodes -------------------------------------------------------------------------------


def tried(failing=(), **changes):
    """What three nodes measured; ``failing``: pairs (source, target)."""
    return {
        s: {
            t: Reached("refused", "10.0.0.9:1", **changes) if (s, t) in failing else Reached()
            for t in range(3)
            if t != s
        }
        for s in range(3)
    }


def test_a_node_that_no_other_node_reaches_is_named():
    (found,) = network.ports(tried([(0, 2), (1, 2)]), label)
    assert found.node == "c"
    assert found.text == "cannot be reached at 10.0.0.9:1 from a, b (refused)"
    assert int(found.code) == 75


def test_a_node_that_reaches_no_other_node_is_named():
    (found,) = network.ports(tried([(1, 0), (1, 2)]), label)
    assert found.node == "b"
    assert found.text.startswith("reaches no other node")


def test_a_single_failing_pair():
    (found,) = network.ports(tried([(1, 2)]), label)
    assert (found.node, "from b (" in found.text) == ("c", True)


def test_an_address_that_only_its_node_can_use_is_a_wrong_setting():
    (found,) = network.ports(tried([(0, 2), (1, 2)], loopback=True), label)
    assert int(found.code) == 64
    assert "GLOO_SOCKET_IFNAME" in found.advice


def test_names_that_do_not_resolve_are_a_warning():
    seen = tried()
    seen[1][0] = Reached(name_error="Name or service not known")
    seen[2][0] = Reached(name_seconds=3.0)
    found = network.names(seen, label)
    assert [(f.node, str(f.status)) for f in found] == [("b", "warning"), ("c", "warning")]
    assert "does not resolve a (Name" in found[0].text


def clock(*, others):
    """Measurements of node 0's clock by others: by how many seconds it is ahead of theirs."""
    return {0: {}, **{n: {0: Reached(ahead=-s, round_trip=0.01)} for n, s in others.items()}}


def test_the_wrong_clock_is_named_even_if_it_is_that_of_node_0():
    assert clocks.compare(clock(others={1: 0.2, 2: -0.2}), label)[0].status is Status.OK
    (found,) = clocks.compare(clock(others={1: 20.0, 2: 20.1}), label)
    assert (found.node, found.text) == ("a", "the clock is 20.0 s behind most others'")
    (found,) = clocks.compare(clock(others={1: 0.0, 2: 3600.0}), label)
    assert (found.node, int(found.code)) == ("c", 75)


def test_a_slow_answer_does_not_count_as_a_wrong_clock():
    slow = {0: {}, 1: {0: Reached(ahead=2.0, round_trip=3.0)}}
    assert clocks.compare(slow, label)[0].status is Status.OK


def test_an_offset_is_measured_without_the_round_trip():
    def slow():
        time.sleep(0.02)
        return 1000.0

    listener = Listener(clock=slow)
    round_trip, ahead = network.ask("127.0.0.1", listener.port, listener.token, lambda: 900.0)
    assert ahead + round_trip / 2 == pytest.approx(100.0)
    with pytest.raises(OSError, match="something else answers"):
        network.ask("127.0.0.1", listener.port, "another")


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
def test_every_pair_is_tested_once_with_one_partner_at_a_time(count):
    ranks = [10 * n for n in range(count)]
    met = []
    for round_ in collectives.rounds(ranks):
        assert all(round_[other] == one for one, other in round_.items())
        met += [frozenset(pair) for pair in round_.items()]
    assert len(set(met)) == count * (count - 1) // 2
    assert len(met) == 2 * len(set(met))


def test_a_slow_node_is_named():
    rates = {0: 9e9, 1: 10e9, 2: 2e9}
    (found,) = collectives.slow_nodes(rates, "computes", "GFLOP/s", label, "")
    assert found.node == "c"
    assert found.text == "computes at 2 GFLOP/s; the others reach 9.5"
    assert collectives.slow_nodes({0: 9e9, 1: 10e9}, "computes", "GFLOP/s", label, "") == []


# -- the user's own code -------------------------------------------------------------------------


@pytest.fixture
def full(tmp_path):
    loaded = load_config([], [*TINY, f"run.dir={tmp_path}/run", "loader.workers=2"], runs=False)
    return Place(World(0, 1, 0, 1, "test", "a"), "full", loaded)


def cannot(_):
    raise RuntimeError("it needs a file")


def test_an_assumed_sample_size_is_used_if_no_sample_can_be_loaded(full, tmp_path):
    (found,) = memory.shared_memory(full, cannot, tmp_path)
    assert (
        "588 KiB (assumed, as the check itself failed: RuntimeError: it needs a file)" in found.text
    )
    assert found.status is not Status.FAILED


def test_a_model_that_cannot_be_built_on_meta_skips_the_check(full):
    (found,) = storage.room(full, cannot)
    assert found.status is Status.SKIPPED
    assert "it needs a file" in found.text


def test_samples_larger_than_shared_memory(full, tmp_path):
    (found,) = memory.shared_memory(full, lambda _: 1 << 50, tmp_path)
    assert int(found.code) == 64
    assert found.values["needed_bytes"] == 6 * 12 << 50


def test_the_table_shows_control_characters(capsys):
    """A text may come from another node, or from the name of a file."""
    table.show("nodes", [ok("storage", "\x1b[2Jwritable"), ok("network", "a\x07")])
    shown = capsys.readouterr().out
    assert "\\x1b[2Jwritable" in shown
    assert "a\\x07" in shown
    assert "\x1b" not in shown
