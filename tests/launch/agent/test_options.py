"""The options of the agent, and those that it refuses."""

import pytest

from launch.agent.options import parse
from train.exits import UsageError

RUN = ["--", "python", "-m", "train", "fit"]


def options(*words, command=RUN, **environ):
    return parse([*words, *command], environ)


def refused(*words, command=RUN, **environ):
    with pytest.raises(UsageError) as caught:
        options(*words, command=command, **environ)
    return str(caught.value)


def test_one_node_needs_no_endpoint_and_uses_any_port():
    alone = options()
    assert (alone.host, alone.port, alone.min_nodes, alone.max_nodes) == ("localhost", 0, 1, 1)
    assert alone.local_addr == "127.0.0.1", (
        "the address must not need the host name, which may not resolve in a container"
    )
    assert alone.preflight == "off"
    told = options("--rdzv-endpoint", "node0:4000", PET_RDZV_PORT="4001")
    assert (told.host, told.port) == ("localhost", 0)
    assert alone.command[1:] == ("-m", "train", "fit")


def test_one_node_of_many_jobs_uses_its_own_rendezvous():
    """Such as a sweep: the launcher numbers the jobs, but they do not wait for each other."""
    assert options(JOB_COMPLETION_INDEX="3").node_rank == 0
    assert options("--nnodes", "4", "--rdzv-endpoint", "a", JOB_COMPLETION_INDEX="3").node_rank == 3


def test_several_nodes_have_a_preflight():
    assert options("--nnodes", "2", "--rdzv-endpoint", "a").preflight == "quick"
    assert options("--nnodes", "2", "--rdzv-endpoint", "a").local_addr is None
    assert options("--nnodes", "2", "--rdzv-endpoint", "a", "--preflight", "off").preflight == "off"
    assert options("--preflight-only", command=[]).preflight == "full"


def test_the_address_that_kubeflow_sets():
    found = options("--nnodes", "2", PET_MASTER_ADDR="a", PET_MASTER_PORT="7", MASTER_ADDR="b")
    assert (found.host, found.port) == ("a", 7)


@pytest.mark.parametrize(
    ("endpoint", "found"),
    [
        ("fe80::1%eth0", ("fe80::1%eth0", 29500)),
        ("run-0.run.my_space.svc:1", ("run-0.run.my_space.svc", 1)),
        ("first", ("first", 29500)),
        ("first:4000", ("first", 4000)),
        ("[::1]:4000", ("::1", 4000)),
        ("[::1]", ("::1", 29500)),
        ("::1", ("::1", 29500)),
    ],
)
def test_endpoints(endpoint, found):
    made = options("--nnodes", "2", "--rdzv-endpoint", endpoint)
    assert (made.host, made.port) == found


def test_environment_variables_are_defaults_of_options():
    environ = {"PET_NNODES": "1:3", "PET_RDZV_ENDPOINT": "a:1", "PET_NPROC_PER_NODE": "2"}
    made = options("--rdzv-endpoint", "b:2", **environ)
    assert (made.min_nodes, made.max_nodes, made.elastic) == (1, 3, True)
    assert (made.host, made.port, made.processes) == ("b", 2, 2)


@pytest.mark.parametrize(
    ("text", "only"), [("1", True), ("true", True), ("0", False), ("False", False), ("", False)]
)
def test_the_variable_of_a_flag(text, only):
    assert options(PET_PREFLIGHT_ONLY=text).preflight_only == only


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--nproc-per-node 2 train.py --lr 1",
         "'train.py' is not an option of the agent (command line); write -- before the command: "
         "`python -m launch.agent [options] -- python train.py --lr 1 ...`."),
        ("-m train fit", "`python -m launch.agent [options] -- python -m train fit ...`."),
        ("--nproc-per-node 2 python -m train fit", "[options] -- python -m train fit ...`."),
        ("isorun fit --config a.yaml", "[options] -- isorun fit --config a.yaml ...`."),
        ("--standalone --nproc_per_node 2 train.py", "--standalone (command line) is an option of"),
    ],
)  # fmt: skip
def test_a_command_line_of_torchrun_gets_a_hint(words, told):
    with pytest.raises(UsageError) as caught:
        parse(words.split(), {})
    assert told in str(caught.value)


def test_localhost_is_never_the_default_endpoint_of_several_nodes():
    assert "no rendezvous endpoint" in refused("--nnodes", "2")
    told = refused("--nnodes", "2", "--rdzv-host-env", "TORCHX_RANK0_HOST")
    assert "TORCHX_RANK0_HOST" in told
    assert "is not set" in told
    told = refused("--nnodes", "2", "--rdzv-host-env", "FIRST", FIRST=" ")
    assert "FIRST" in told


def test_the_first_host_is_found_in_a_slurm_node_list():
    made = options("--nnodes", "2", "--rdzv-host-env", "NODES", NODES="gpu[03-05],login")
    assert made.host == "gpu03"


@pytest.mark.parametrize(
    ("words", "environ", "told"),
    [
        (["--nnodes", "0"], {}, "'0' (--nnodes)"),
        (["--nnodes", "3:2"], {}, "'3:2'"),
        ([], {"PET_NNODES": "two"}, "PET_NNODES"),
        (["--nproc-per-node", "0"], {}, "--nproc-per-node"),
        (["--nproc-per-node", "gpu"], {}, "sees no GPU"),
        (["--max-restarts", "-1"], {}, "--max-restarts"),
        (["--max-restarts", "1.5"], {}, "whole number"),
        (["--rdzv-timeout", "soon"], {}, "'soon'"),
        (["--rdzv-timeout", "0.5"], {}, "at least 1"),
        (["--shutdown-timeout", "inf"], {}, "'inf'"),
        (["--shutdown-timeout", "nan"], {}, "'nan'"),
        (["--rdzv-conf", "min_nodes=1"], {}, "an option of its own"),
        (["--rdzv-endpoint", "a:http"], {}, "'http'"),
        (["--rdzv-endpoint", "a:70000"], {}, "'70000'"),
        (["--rdzv-backend", "etcd"], {}, "c10d"),
        *[
            (["--nnodes", "2", "--rdzv-endpoint", text], {}, "must be a host name or an IP address")
            for text in ("http://a:1", "a:1:2", "a:-1", "[::1", "a b:1", "a/b", "256.1.1.1", "a-:1")
        ],
        (["--nnodes", "2"], {"MASTER_ADDR": "tcp://a"}, "(environment variable MASTER_ADDR)"),
        (["--rdzv-conf", "keep_alive_intervall=1"], {}, "did you mean keep_alive_interval?"),
        (["--rdzv-conf", "keep_alive_interval=0"], {}, "must be at least 1"),
        (["--rdzv-conf", "join_timeout=-1"], {}, "must be at least 1"),
        (["--rdzv-timeout", "1e300"], {}, "at most 1000000000"),
        (["--max-restarts", "9" * 20], {}, "at most 1000000000"),
        (["--rdzv-conf", "timeout"], {}, "KEY=VALUE"),
        (["--preflight", "maybe"], {}, "'maybe'"),
        ([], {"PET_PREFLIGHT_ONLY": "yes"}, "PET_PREFLIGHT_ONLY must be 1, true, 0 or false"),
        (["--preflight-only", "--preflight", "off"], {}, "--preflight is off (--preflight)"),
        (["--preflight-only"], {"PET_PREFLIGHT": "off"}, "off (environment variable PET_PREFLIGHT"),
        (["--nnodes", "2", "--rdzv-endpoint", "a", "--node-rank", "first"], {}, "'first'"),
        (
            ["--nnodes", "2", "--rdzv-endpoint", "a"],
            {"JOB_COMPLETION_INDEX": "x"},
            "JOB_COMPLETION_INDEX",
        ),
        (["--shutdown-timeout", "20"], {"ISORUN_STOP_DEADLINE": "25"}, "ISORUN_STOP_DEADLINE"),
        (["--shutdown-timeout", "0"], {}, "must be a number of seconds above 0, but is '0'"),
        *[
            ([], {"ISORUN_STOP_DEADLINE": text}, f"seconds above 0, but is {text!r} (environment)")
            for text in ("nan", "inf", "-1", "0", "soon")
        ],
        # str.isdigit is true for a superscript two, which int() refuses.
        (["--nproc-per-node", "\N{SUPERSCRIPT TWO}"], {}, "--nproc-per-node must be a number"),
        (["--rdzv-endpoint", "a:\N{SUPERSCRIPT TWO}"], {}, "must be a number from 1 to 65535"),
        (
            ["--nnodes", "2"],
            {"MASTER_ADDR": "a", "MASTER_PORT": "abc"},
            "but is 'abc' (environment variable MASTER_PORT)",
        ),
        (
            ["--nnodes", "2", "--rdzv-endpoint", "a", "--node-rank", "\N{SUPERSCRIPT TWO}"],
            {},
            "--node-rank must be a whole number",
        ),
        (["--nodes", "2"], {}, "--nodes"),
        (["--rdzv-endpoint", "a:0"], {}, "must be a number from 1 to 65535, but is '0'"),
        (
            ["--nnodes", "2", "--rdzv-endpoint", "a", "--node-rank", "5"],
            {},
            "--node-rank is 5 (--node-rank), but --nnodes is 2 (--nnodes), so nodes have the "
            "numbers 0 to 1; correct one of them.",
        ),
        (
            ["--nnodes", "1:3", "--rdzv-endpoint", "a"],
            {"JOB_COMPLETION_INDEX": "3"},
            "--node-rank is 3 (environment variable JOB_COMPLETION_INDEX), but --nnodes is 1:3",
        ),
        (["--node-rank", "1"], {}, "but --nnodes is 1 (default), so nodes have the numbers 0 to 0"),
        (["--standalone"], {}, "--standalone (command line) is an option of torchrun, not of the"),
        (["--master_addr=a"], {}, "not of the agent; use --rdzv-endpoint"),
        (["--master-port", "1"], {}, "not of the agent; use --rdzv-port"),
        (["--tee", "3"], {}, "--tee (command line) is an option of torchrun"),
    ],
)
def test_errors_name_the_option_or_variable(words, environ, told):
    assert told in refused(*words, **environ)


def test_a_command_is_required():
    assert "nothing to run" in refused(command=[])
    assert "nothing to do" in refused("--preflight-only", "--preflight", "off", command=[])


def test_ranks_get_less_time_than_the_agent():
    made = options("--shutdown-timeout", "60")
    assert made.stop_deadline < made.shutdown_timeout == 60


@pytest.mark.parametrize("nodes", ["\u0662", "1:\uff12", "9" * 5000])
def test_a_number_of_nodes_has_ascii_digits(nodes):
    assert "--nnodes must be a number of nodes" in refused("--nnodes", nodes)
