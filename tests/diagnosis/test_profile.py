"""What a trace says, and ``isorun profile``."""

import gzip
import json
import os

import pytest

from tests.diagnosis.test_overfit import BASE
from tests.support.forked import command, run, run_ranks
from train.exits import DataError, Exit
from train.profiling.intervals import difference, intersection, length, union
from train.profiling.table import table
from train.profiling.trace import read_profile, summarize


def event(name, start, end, category="cpu_op", thread=1):
    return {
        "ph": "X", "cat": category, "name": name, "pid": 1, "tid": thread, "ts": start,
        "dur": end - start,
    }  # fmt: skip


def mark(name, start, end):
    return event(name, start, end, "user_annotation")


def profile(*events, **more):
    return summarize({"traceEvents": [mark("ProfilerStep#4", 0, 100), *events], **more})


def percent(found):
    return {name: round(100 * share) for name, share in found.shares.items()}


def test_sets_of_moments():
    one, other = union([(4, 6), (0, 2), (1, 3), (9, 9)]), [(2, 5), (8, 9)]
    assert one == [(0, 3), (4, 6)]
    assert intersection(one, other) == [(2, 3), (4, 5)]
    assert difference(one, other) == [(0, 2), (5, 6)]
    assert difference(one, []) == one
    assert length(one) == 5


def test_shares_on_a_cpu():
    found = profile(
        mark("isorun.data", 0, 10),
        event("aten::stack", 2, 8),  # within data
        mark("isorun.forward", 10, 40),
        event("aten::addmm", 12, 38),
        # The count of the batch, beside the forward pass, and the wait for it.
        mark("gloo:all_reduce", 10, 45),
        mark("isorun.wait", 40, 45),
        event("autograd::engine::evaluate_function: AddmmBackward0", 45, 90),
        event("AddmmBackward0", 45, 90),
        event("aten::mm", 46, 60, thread=2),
        mark("gloo:all_reduce", 55, 80),
        event("aten::mm", 150, 200),  # after the step
    )
    assert percent(found) == {"data": 10, "compute": 40, "communication": 25, "host": 25}
    assert sum(found.shares.values()) == pytest.approx(1.0)
    assert (found.steps, found.step_seconds) == (1, pytest.approx(100e-6))


def test_shares_on_a_gpu():
    kernel = "void at::native::vectorized_elementwise_kernel"
    found = profile(
        mark("isorun.data", 0, 30),
        event(kernel, 0, 20, "kernel", thread=7),  # the data is loaded meanwhile
        event("aten::mm", 30, 60),  # only launches
        event("sm90_gemm", 35, 60, "kernel", thread=7),
        event("ncclDevKernel_AllReduce_Sum_f32", 50, 80, "kernel", thread=20),
        event("Memcpy HtoD", 80, 85, "gpu_memcpy", thread=7),
        mark("isorun.wait", 84, 90),
    )
    assert percent(found) == {"data": 10, "compute": 50, "communication": 25, "host": 15}
    assert [k.name for k in found.kernels[:2]] == ["ncclDevKernel_AllReduce_Sum_f32", "sm90_gemm"]


def test_operators_by_their_own_time():
    found = profile(
        event("aten::linear", 0, 50),
        event("aten::addmm", 5, 45),
        event("aten::copy_", 10, 20),
        event("aten::copy_", 60, 65),
        event("aten::linear", 0, 10, thread=2),
    )
    times = {o.name: (o.calls, round(1e6 * o.seconds)) for o in found.operators}
    assert times == {"aten::linear": (2, 20), "aten::addmm": (1, 30), "aten::copy_": (2, 15)}
    assert found.operators[0].name == "aten::addmm"


def test_ranks_have_a_column_each_or_are_summed_up():
    found = profile(distributedInfo={"rank": 1, "world_size": 2})
    shares = {"data": 0.25, "compute": 0.5, "communication": 0.25, "host": 0.0}
    assert "rank 1" in table(found, {0: shares, 1: found.shares}, 5).splitlines()[2]
    many = table(found, dict.fromkeys(range(64), shares), 5).splitlines()
    assert many[2].split()[-3:] == ["mean", "least", "most"]


@pytest.mark.parametrize(
    "events",
    [
        [],
        [{"ph": "X", "name": "ProfilerStep#1", "cat": "user_annotation", "ts": "0", "dur": 5}],
        [{"ph": "X", "name": "ProfilerStep#1", "cat": "user_annotation", "ts": 0, "dur": -5}],
        [None, 3, {"ph": "X"}],
    ],
)
def test_a_trace_without_steps_is_refused(tmp_path, events):
    path = tmp_path / "rank-0-step-1.pt.trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    with pytest.raises(DataError, match="has no step"):
        read_profile(path)


# With a fixed time: pytest names the cases by their bytes, and all processes must name them alike.
PACKED = [gzip.compress(text, mtime=0) for text in (b"[]", b"{")]


@pytest.mark.parametrize("data", [b"", b"no gzip", *PACKED])
def test_a_damaged_trace_is_refused(tmp_path, data):
    path = tmp_path / "rank-0-step-1.pt.trace.json.gz"
    path.write_bytes(data)
    with pytest.raises(DataError, match="is no trace"):
        read_profile(path)


def test_a_config_is_profiled_without_a_run(tmp_path):
    words = ["--steps", "2", "--warmup", "1", "--top", "4", "--to", tmp_path / "to"]
    done = run("profile", tmp_path / "run", *words, base=BASE)
    assert "2 steps, " in done.stdout
    for line in ("data wait", "compute", "communication", "host and other", "aten::"):
        assert line in done.stdout
    assert not os.path.lexists(tmp_path / "run")
    values = json.loads((tmp_path / "to" / "profile.json").read_text())
    assert sum(values["shares"].values()) == pytest.approx(1.0)
    assert values["shares"]["compute"] > 0
    assert values["shares"]["data"] > 0
    assert len(values["operators"]) == 4
    (trace,) = (tmp_path / "to").glob("rank-0-*.gz")
    assert read_profile(trace).shares == values["shares"]


def test_ranks_communicate(tmp_path):
    words = ["--json", "strategy=ddp"]
    main, other = run_ranks(2, "profile", tmp_path / "run", *words, base=BASE)
    values = json.loads(main.stdout)
    assert values["ranks"].keys() == {"0", "1"}
    assert values["world_size"] == 2
    assert values["shares"]["communication"] > 0
    assert other.stdout == ""


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--steps", "0"], "--steps is 0; set at least 1"),
        (["--warmup", "-1"], "--warmup is -1"),
        (["--to", "pyproject.toml"], "--to is 'pyproject.toml', which cannot be written to"),
        (["profile.activ=3"], "did you mean profile.active"),
        (["profile.active=0"], "profile.active"),
        (["profile.ranks=[-1]"], "profile.ranks"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, words, text):
    done = run("profile", tmp_path, *words, base=BASE, expect=Exit.USAGE)
    assert text in done.stderr


def test_a_directory_without_a_run_is_refused(tmp_path):
    done = command("profile", str(tmp_path), expect=Exit.USAGE)
    assert str(tmp_path) in done.stderr
