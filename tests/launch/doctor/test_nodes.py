"""The doctor on two nodes, simulated by two processes: the checks that compare nodes."""

import json
import re
import subprocess
import sys

import pytest

from tests.launch.doctor.doctors import (
    FIT,
    clean,
    doctor,
    in_mount_namespace,
    why_no_mount_namespace,
    with_sitecustomize,
)
from tests.support.runs import ROOT, free_port


def two(tmp_path, **kwargs):
    return {
        "tmp_path": tmp_path,
        "nodes": 2,
        "command": [*FIT, f"run.dir={tmp_path}/run"],
        **kwargs,
    }


def test_two_healthy_nodes(tmp_path):
    told = doctor(**two(tmp_path))
    assert told.report["world_size"] == 2
    assert all("(node " in node for node in told.report["nodes"]), (
        "nodes on one host must be numbered"
    )
    for check in ("versions", "network", "shared directory", "all-reduce", "clocks"):
        assert told.only(check, "ok")["node"] == "all nodes"
    assert told.only("clocks", "ok")["values"]["most_seconds"] < 0.5
    assert told.output[0].startswith("Preflight (quick): 2 nodes, 2 processes")
    assert told.output[1] == "", "only rank 0 may print"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.slow
def test_full_measures_the_network_and_both_nodes(tmp_path):
    command = [*FIT, f"run.dir={tmp_path}/run"]
    told = doctor(tmp_path, "--level", "full", nodes=2, command=command)
    rates = told.found("bandwidth")[0]["values"]
    assert len(rates) == 4
    assert min(rates.values()) > 0
    assert told.found("slow node")
    assert len({f["node"] for f in told.found("disk speed")}) == 2


@pytest.mark.slow
def test_under_torchrun(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m",
         "launch.doctor", *FIT, f"run.dir={tmp_path}/run"],
        cwd=ROOT, env=clean(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Preflight (quick): 1 node, 2 processes" in done.stdout
    assert "gloo sums correctly over 2 ranks" in done.stdout
    assert "micro-batch 6 x accumulation 1, global batch 12" in done.stdout


@pytest.mark.slow
def test_a_node_with_a_different_version(tmp_path):
    fake = tmp_path / "fake" / "accelerate-9.9.9.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: accelerate\nVersion: 9.9.9\n")
    told = doctor(**two(tmp_path, each=[{}, {"PYTHONPATH": str(fake.parent)}], expect=64))
    failed = told.only("versions", "failed")
    assert failed["node"] == told.report["nodes"][1]
    assert re.search(r"accelerate is 9\.9\.9, elsewhere \d", failed["text"])


@pytest.mark.slow
def test_a_clock_that_is_ahead(tmp_path):
    code = "import time\nreal = time.time\ntime.time = lambda: real() + 30\n"
    each = [{}, with_sitecustomize(tmp_path / "site", code)]
    told = doctor(**two(tmp_path, each=each))
    found = told.only("clocks", "warning")
    assert found["node"] == told.report["nodes"][1]
    assert found["values"]["ahead_seconds"] == pytest.approx(30, abs=0.5)
    assert "30.0 s ahead of" in found["text"]


@pytest.mark.slow
@pytest.mark.skipif(why_no_mount_namespace() is not None, reason=str(why_no_mount_namespace()))
def test_a_directory_that_is_not_shared(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    told = doctor(
        tmp_path, nodes=2, expect=64, command=[*FIT, f"run.dir={shared}/run"],
        before=[[], in_mount_namespace(f"mount -t tmpfs tmpfs {shared}")],
    )  # fmt: skip
    failed = told.only("shared directory", "failed")
    assert failed["node"] == told.report["nodes"][1]
    assert "did not appear here" in failed["text"]
    assert "NFS" in failed["advice"]
    assert list(shared.iterdir()) == []


def test_a_different_config_and_run_directory_on_one_node(tmp_path):
    commands = [[*FIT, f"run.dir={tmp_path}/{name}"] for name in "ab"]
    told = doctor(tmp_path, nodes=2, command=commands, expect=64)
    assert told.only("config", "failed")["node"] == told.report["nodes"][1]
    assert (
        f"the run directory is {tmp_path}/b here" in told.only("shared directory", "failed")["text"]
    )


@pytest.mark.slow
def test_a_config_that_only_one_node_cannot_read(tmp_path):
    (tmp_path / "more.yaml").write_text("run:\n  seed: 1\n")
    commands = [
        [*FIT, "--config", str(tmp_path / name), f"run.dir={tmp_path}/run"]
        for name in ("more.yaml", "missing.yaml")
    ]
    told = doctor(tmp_path, nodes=2, command=commands, expect=64)
    failed = told.only("config", "failed")
    assert failed["node"] == told.report["nodes"][1]
    assert "missing.yaml" in failed["text"]
    assert told.only("all-reduce", "ok"), "checks that need no config must run"


@pytest.mark.slow
def test_a_batch_that_cannot_be_divided(tmp_path):
    told = doctor(**two(tmp_path, command=[*FIT, "batch.global_batch_size=1"], expect=64))
    assert "leaves a micro-batch empty on 2 ranks" in told.only("config", "failed")["text"]


@pytest.mark.slow
def test_a_proxy_between_the_nodes(tmp_path):
    env = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "elsewhere"}
    told = doctor(**two(tmp_path, env=env))
    assert "no_proxy does not have" in told.only("proxies", "warning")["text"]
    told = doctor(**two(tmp_path, env={**env, "no_proxy": "*"}))
    assert told.only("proxies", "ok")


def test_a_rank_that_never_joins(tmp_path):
    told = doctor(tmp_path, "--wait", "4", nodes=2, only=[0], expect=75)
    failed = told.only("ranks", "failed")
    assert failed["text"] == "1 of 2 ranks did not join within 4 s: 1"
    assert told.only("all-reduce", "skipped")["text"] == "skipped because 1 rank(s) are missing"
    assert told.only("memory", "ok"), "node 0 must be checked"


@pytest.mark.slow
def test_rank_0_that_never_joins(tmp_path):
    told = doctor(tmp_path, "--wait", "2", nodes=2, only=[1], expect=75)
    assert "waiting for the store at 127.0.0.1:" in told.errors[0]
    assert len(told.errors[0].splitlines()) == 1


@pytest.mark.slow
def test_a_node_that_dies_during_the_checks(tmp_path):
    code = (
        "import os, threading\n"
        "start = threading.Thread.start\n"
        "def die(thread): os._exit(0) if thread.name == 'listener' else start(thread)\n"
        "threading.Thread.start = die\n"
    )
    each = [{}, with_sitecustomize(tmp_path / "site", code)]
    told = doctor(**two(tmp_path, each=each, expect=[75, 0]))
    failed = told.only("ranks", "failed")
    assert "rank 1 stopped answering" in failed["text"]


@pytest.mark.slow
def test_wrong_sums(tmp_path):
    code = (
        "import sys, os, torch.distributed as dist\n"
        "right = dist.all_reduce\n"
        "def wrong(tensor, *args, **kwargs):\n"
        "    right(tensor, *args, **kwargs)\n"
        "    tensor.view(-1)[7] += os.environ['RANK'] == '1'\n"
        "dist.all_reduce = wrong\n"
        "from launch.doctor.cli import main\n"
        "code = main()\n"
        "sys.stdout.flush()\n"
        "os._exit(code)\n"
    )
    told = doctor(**two(tmp_path, module=("-c", code), expect=75))
    failed = told.only("all-reduce", "failed")
    assert failed["text"] == "rank 1 got 1 of 65536 sums wrong"
    assert failed["node"] == told.report["nodes"][1]


def test_keys_of_an_earlier_start_in_the_store_are_ignored(tmp_path):
    """Two preflights in the same store."""
    import threading

    from torch.distributed import HashStore

    from launch.doctor.place import Place
    from launch.doctor.rendezvous import join
    from train.distributed.world import World

    store = HashStore()
    places = [Place(World(rank, 2, 0, 1, "test", "host"), "quick") for rank in range(2)]
    for _ in range(2):
        met = {}

        def come(rank, met=met):
            met[rank] = join(places[rank], store, 20.0)

        threads = [threading.Thread(target=come, args=(rank,)) for rank in (1, 0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert met[0].members == met[1].members
        met[1].publish("topic", "word")
        assert met[0].collect("topic", [1], 5.0) == {1: "word"}


@pytest.mark.slow
def test_rank_0_dies_during_the_checks(tmp_path):
    code = (
        "import os, threading\n"
        "start = threading.Thread.start\n"
        "def die(thread): os._exit(0) if thread.name == 'listener' else start(thread)\n"
        "threading.Thread.start = die\n"
    )
    each = [with_sitecustomize(tmp_path / "site", code), {}]
    # Not quick: the doctor turns off torch's own messages before it imports it.
    told = doctor(**two(tmp_path, each=each, expect=[0, 75]), quick=False)
    assert told.report is None
    assert "Rank 1 on " in told.errors[1]
    assert "Check rank 0's log" in told.errors[1]
    assert len(told.errors[1].splitlines()) == 1


@pytest.mark.slow
def test_two_agents_with_two_processes_each(tmp_path):
    port = free_port()
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node",
             "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf",
             f"is_host={int(node == 0)}", "--local-addr", "127.0.0.1", "-m", "launch.doctor",
             "--json", str(tmp_path / "report.json"), *FIT, f"run.dir={tmp_path}/run"],
            cwd=ROOT, env=clean(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    done = [agent.communicate(timeout=300) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], done
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["world_size"] == 4
    assert len(report["nodes"]) == 2
    assert [m["leads"] for m in sorted(report["members"], key=lambda m: m["rank"])] == [
        True, False, True, False,
    ]  # fmt: skip
    said = "".join(output for output, _ in done)
    assert said.count("Preflight (quick): 2 nodes, 4 processes") == 1
    assert "gloo sums correctly over 4 ranks" in said
