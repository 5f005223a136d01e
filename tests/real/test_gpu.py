"""Runs on a GPU: equal curves with every strategy and on the CPU, resuming, precisions, memory that
does not suffice, and what the commands report of the GPU."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.support.runs import (
    ROOT,
    assert_same_bits,
    curve,
    metrics,
    run,
    tensors,
)
from train.exits import Exit

STRATEGIES = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
BASE = ["deterministic=true", "checkpoint.every_steps=10", "checkpoint.keep_last=9"]
BASE += ["batch.micro_batch_size=4", "ema.decay=0.9", "optim.weight_decay=0.1"]
EQUAL = [*BASE, "model.dropout=0.0"]
TEXT = ["task.use=tests.support.small_gpu:SmallGpuTask", "model.width=512", "model.heads=8"]
TEXT += ["data.context=512", "batch.global_batch_size=256", "length.steps=2", "optim.lr=0.001"]
SOME = ["batch.global_batch_size=8", "batch.micro_batch_size=8", "length.steps=9"]
TEXT += ["track.tensorboard=false", "track.wandb=disabled", "track.log_every_steps=1"]


def start(directory, *overrides, name="fit", cpu=False, **options):
    """Runs a command to its end, on the GPU unless ``cpu``."""
    env = {"CUDA_VISIBLE_DEVICES": ""} if cpu else {}
    return run(name, directory, *overrides, expect=None, env=env, **options)


def succeeded(done):
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("this machine has no GPU that torch can use")


@pytest.fixture(scope="module")
def runs(gpu, tmp_path_factory):
    """The directory of each run by its name; all run at the same time."""
    root = tmp_path_factory.mktemp("gpu")
    wanted = {"cpu": (EQUAL, None, True), "gpu": (EQUAL, None, False)}
    for strategy in STRATEGIES:
        wanted[strategy] = ([*EQUAL, f"strategy={strategy}"], 1, False)
        options = [*BASE, f"strategy={strategy}"]
        wanted[f"{strategy} undisturbed"] = (options, 1, False)
        wanted[f"{strategy} killed"] = ([*options, "task.kill_at_step=45"], 1, False)
    offload = {"fsdp2": "fsdp2.cpu_offload=true", "zero2": "zero.offload_optimizer=cpu"}
    for strategy, option in offload.items():
        wanted[f"{strategy} offload"] = ([*EQUAL, f"strategy={strategy}", option], 1, False)
    for precision in ("bf16", "fp16"):
        wanted[precision] = ([*EQUAL, f"precision={precision}", "strategy=ddp"], 1, False)
    wanted["compiled"] = ([*EQUAL, "compile=true"], None, False)

    def finish(name):
        options, processes, cpu = wanted[name]
        directory = root / name.replace(" ", "-")
        done = start(directory, *options, processes=processes, cpu=cpu)
        if name.endswith("killed"):
            assert done.returncode != 0
            done = start(directory, *options, processes=processes)
        return done

    with ThreadPoolExecutor(8) as pool:
        ended = dict(zip(wanted, pool.map(finish, wanted), strict=True))

    def of(name):
        succeeded(ended[name])
        return root / name.replace(" ", "-")

    return of


@pytest.mark.parametrize("name", ["gpu", *STRATEGIES, "fsdp2 offload", "zero2 offload", "compiled"])
def test_the_curve_is_that_of_the_cpu(runs, name):
    for key in ("train/loss", "train/gradient_norm"):
        expected, found = curve(runs("cpu"), key), curve(runs(name), key)
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_killed_run_goes_on_bitwise(runs, strategy):
    """Dropout's masks come from the GPU's generator."""
    undisturbed, killed = runs(f"{strategy} undisturbed"), runs(f"{strategy} killed")
    assert len((killed / "attempts.jsonl").read_text().splitlines()) > 1
    assert curve(killed) == curve(undisturbed)
    assert_same_bits(tensors(killed), tensors(undisturbed))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_as_fp32_does(runs, precision):
    expected, found = curve(runs("cpu")), curve(runs(precision))
    assert found[40] == pytest.approx(expected[40], rel=0.1)


@pytest.mark.parametrize(("before", "after"), [("gpu", "2 fsdp2"), ("zero3", "1"), ("cpu", "gpu")])
def test_a_run_moves_between_the_gpu_and_the_cpu(runs, tmp_path, before, after):
    directory = tmp_path / "run"
    shutil.copytree(runs(before), directory)
    for step in (20, 30, 40):
        shutil.rmtree(directory / "checkpoints" / f"step-{step:012d}")
    count, _, strategy = after.partition(" ")
    where = [f"strategy={strategy}"] if strategy else []
    processes = int(count) if strategy else None
    succeeded(start(directory, *EQUAL, *where, processes=processes, cpu=after != "gpu"))
    assert curve(directory) == pytest.approx(curve(runs("cpu")), rel=1e-3)


def test_the_run_records_the_gpu(runs):
    attempt = json.loads((runs("gpu") / "attempts.jsonl").read_text().splitlines()[0])
    assert attempt["environment"]["gpu"] == torch.cuda.get_device_name()
    assert attempt["environment"]["cuda"]
    assert metrics(runs("gpu"))[-1]["memory/device_peak_gib"] > 0


def test_checkpoints_are_complete_and_evaluate_on_the_gpu(runs):
    directory = runs("zero3")
    verified = subprocess.run(
        [sys.executable, "-m", "train", "verify", str(directory)], cwd=ROOT, text=True,
        capture_output=True,
    )  # fmt: skip
    succeeded(verified)
    evaluated = succeeded(start(directory, *EQUAL, name="evaluate"))
    assert f"{metrics(runs('gpu'))[-1]['eval/loss']:.4f}" in evaluated.stdout


@pytest.fixture(scope="module")
def text(gpu, tmp_path_factory):
    """Runs of the text task in a part of the GPU, and other commands, all at the same time."""
    root = tmp_path_factory.mktemp("text")
    wanted = {
        "auto": (["precision=bf16"], {}),
        "too large": (["batch.micro_batch_size=256", "profile.memory=true"], {}),
        "lr-find": (SOME, {"name": "lr-find"}),
        "overfit": (SOME, {"name": "overfit"}),
        "batch-size": (["precision=bf16"], {"name": "batch-size"}),
        "profile": ([*SOME, "precision=bf16"], {"name": "profile"}),
        "two ranks": (["task.fraction=0.1"], {"processes": 2}),
        "hang": ([*SOME, "task.hang=true", "watchdog.timeout=5"], {}),
        "bad index": ([*SOME, "task.bad_index=true"], {}),
    }

    def finish(name):
        overrides, options = wanted[name]
        return start(root / name.replace(" ", "-"), *overrides, base=TEXT, **options)

    with ThreadPoolExecutor(5) as pool:
        ended = dict(zip(wanted, pool.map(finish, wanted), strict=True))
    return lambda name: (ended[name], root / name.replace(" ", "-"))


def test_the_micro_batch_is_found_by_trials(text):
    done, directory = text("auto")
    succeeded(done)
    row = metrics(directory)[-1]
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    assert 0 < row["memory/device_peak_gib"] < 0.04 * total
    assert row["speed/mfu"] > 0


def test_out_of_memory_names_what_to_change_and_keeps_a_snapshot(text):
    done, directory = text("too large")
    assert done.returncode == Exit.OUT_OF_MEMORY, done.stderr
    assert "batch.micro_batch_size" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((directory / "profile").rglob("*.memory.pickle"))


@pytest.mark.parametrize("name", ["lr-find", "overfit", "batch-size", "profile"])
def test_commands_that_examine_a_task(text, name):
    done, _ = text(name)
    succeeded(done)
    assert "Traceback" not in done.stderr


def test_two_ranks_with_the_same_gpu_are_refused(text):
    done, _ = text("two ranks")
    assert "Ranks 0, 1 have the same GPU" in done.stderr


def test_a_hang_on_the_gpu_is_reported(text):
    done, directory = text("hang")
    assert done.returncode == Exit.RETRY, done.stderr
    report = next((directory / "hangs").rglob("report.txt")).read_text()
    assert "time.sleep" in report or "small_gpu.py" in report


def test_a_failed_assertion_of_a_kernel_is_an_error_of_the_program(text):
    done, _ = text("bad index")
    assert done.returncode == Exit.INTERNAL, done.stderr
    assert "device-side assert" in done.stderr


def test_doctor_finds_the_gpu(gpu, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "launch", "doctor", "--level", "full", "--json", tmp_path / "found"],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    succeeded(done)
    assert torch.cuda.get_device_name() in done.stdout
