"""The options of each strategy change speed or memory but not the run; invalid ones are refused."""

import json
import shutil

import pytest

from tests.support.forked import run, run_ranks
from tests.support.lanes import slow, thinned
from tests.support.runs import (
    assert_same_bits,
    checkpoints,
    tensors,
    tiny_config,
)
from train.data.plan import BatchPlan
from train.exits import UsageError
from train.parity.compare import compare, curve, largest_difference
from train.strategies.registry import resolve_name
from train.strategies.zero_config import deepspeed_config

TEXT = [
    "--config", "configs/text.yaml", "model.layers=2", "model.heads=2", "model.width=32",
    "data.context=64", "task.sample_tokens=8", "batch.global_batch_size=24", "batch.micro_batch_size=6", "optim.lr=1e-3",
    "model.dropout=0.1", "length.steps=20", "schedule.warmup_steps=2", "evaluate.every_steps=null", "evaluate.micro_batch_size=64",
    "track.tensorboard=false", "track.wandb=disabled", "track.log_every_steps=1",
    "checkpoint.every_steps=10",
]  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plain")
    run("fit", directory, base=TEXT)
    return directory


OPTIONS = [
    (1, ["activation_checkpointing=true"]),
    (2, ["strategy=ddp", "activation_checkpointing=true"]),
    (2, ["strategy=ddp", "ddp.static_graph=true"]),
    (2, ["strategy=ddp", "ddp.bucket_cap_mb=1", "ddp.gradient_as_bucket_view=false"]),
    (2, ["strategy=fsdp2", "activation_checkpointing=true"]),
    (2, ["strategy=fsdp2", "fsdp2.reshard_after_forward=false"]),
    (2, ["strategy=fsdp2", "fsdp2.cpu_offload=true"]),
    (2, ["strategy=fsdp2", "fsdp2.blocks=[Attention]"]),
    (4, ["strategy=fsdp2", "fsdp2.replicas=2"]),
    (2, ["strategy=zero1", "zero.overlap_comm=false", "zero.reduce_bucket_size=1000"]),
    (2, ["strategy=zero2", "zero.offload_optimizer=cpu"]),
    (2, ["strategy=zero3", "zero.offload_optimizer=cpu", "zero.offload_parameters=cpu"]),
    (2, ["strategy=zero3", "zero.param_persistence_threshold=0", "activation_checkpointing=true"]),
]


# Recomputation, which changes the most. Offload is the slowest.
IN_TEST = [OPTIONS[0]]


@pytest.mark.parametrize(
    ("ranks", "options"), thinned(OPTIONS, kept=IN_TEST), ids=lambda v: str(v).replace("=", "-")
)
def test_options_do_not_change_the_run_and_it_resumes(plain, tmp_path, ranks, options):
    run_ranks(ranks, "fit", tmp_path, *options, base=TEXT)
    found = compare(plain, tmp_path)
    assert found.same_ledger
    assert found.loss < 1e-5
    assert found.norm < 1e-4
    assert found.weights < 1e-5
    # Resume from the middle.
    (tmp_path / "finished.json").unlink()
    assert checkpoints(tmp_path)[-1] == 20
    shutil.rmtree(tmp_path / "checkpoints/step-000000000020")
    run_ranks(ranks, "fit", tmp_path, *options, base=TEXT)
    attempt = json.loads((tmp_path / "attempts.jsonl").read_text().splitlines()[-1])
    assert attempt["resumed_from_step"] == 10
    assert compare(plain, tmp_path).weights < 1e-5
    assert tensors(plain).keys() == tensors(tmp_path).keys()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["strategy=ddp", "ddp.comm_hook=bf16"], "ddp.comm_hook is 'bf16', which needs GPUs"),
        (
            ["strategy=fsdp2", "fsdp2.replicas=3"],
            "fsdp2.replicas is 3, which does not divide the 2",
        ),
        slow((["strategy=fsdp2", "fsdp2.blocks=[Attentoin]"], "fsdp2.blocks names 'Attentoin'")),
        (["strategy=fsdp2", "optim.use=adafactor", "optim.betas=null"], "optim.use is 'adafactor'"),
        slow(
            (["strategy=zero1", "optim.use=adagrad", "optim.betas=null"], "optim.use is 'adagrad'")
        ),
        slow(
            (
                ["strategy=fsdp2", "optim.use=torch.optim:Adafactor", "optim.betas=null"],
                "because that",
            )
        ),
        (
            ["strategy=zero3", "optim.use=tests.support.optimizers:Trust", "optim.betas=null"],
            "because that shards parameters",
        ),
        slow((["strategy=zero2", "zero.offload_parameters=cpu"], "but only stage 3 shards")),
        (["strategy=fdsp2"], "strategy must be"),
    ],
)
def test_invalid_options_are_refused(tmp_path, overrides, expected):
    for done in run_ranks(2, "fit", tmp_path, *overrides, base=TEXT, expect=64):
        assert expected in done.stderr
        assert "Traceback" not in done.stderr


def test_activation_checkpointing_needs_blocks(tmp_path):
    done = run("fit", tmp_path, "activation_checkpointing=true", expect=64)
    assert "the model has no blocks" in done.stderr


def generated(*overrides, stage=2, ranks=2, **more):
    config = tiny_config(*overrides)
    plan = BatchPlan.from_config(config.batch, ranks)
    return deepspeed_config(config.zero, stage, plan, **more)


@pytest.mark.slow
def test_deepspeed_s_config_is_written_without_auto_values(tmp_path):
    run_ranks(2, "fit", tmp_path, "strategy=zero2", "length.steps=6")
    written = json.loads((tmp_path / "deepspeed.json").read_text())
    assert written == generated("strategy=zero2", "length.steps=6")
    assert '"auto"' not in json.dumps(written)
    assert written["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    ("option", "on_gpu", "pinned"),
    [("true", True, True), ("false", True, False), ("true", False, False)],
)
def test_offloaded_tensors_are_in_locked_memory_on_a_gpu(option, on_gpu, pinned):
    options = ["zero.offload_optimizer=cpu", "zero.offload_parameters=cpu"]
    options.append(f"zero.pin_memory={option}")
    zero = generated(*options, stage=3, on_gpu=on_gpu)["zero_optimization"]
    for section in ("offload_optimizer", "offload_param"):
        assert zero[section] == {"device": "cpu", "pin_memory": pinned}


@pytest.mark.parametrize(("micro", "accumulation"), [("auto", 1), ("3", 2), ("1", 6)])
def test_deepspeed_s_batch_sizes_agree_with_the_plan(micro, accumulation):
    settings = generated(f"batch.micro_batch_size={micro}")
    assert settings["gradient_accumulation_steps"] == accumulation
    per_rank = settings["train_micro_batch_size_per_gpu"] * accumulation
    assert settings["train_batch_size"] == 2 * per_rank == 12


def test_keys_of_zero_config_are_merged_in():
    settings = generated(
        "zero.config={zero_optimization: {stage3_module_granularity_threshold: 5}, dump_state: true}",
        stage=3,
    )
    assert settings["zero_optimization"]["stage3_module_granularity_threshold"] == 5
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["dump_state"] is True


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("{zero_optimization: {stage: 1}}", "zero.config.zero_optimization.stage is 1, but"),
        ("{gradient_clipping: 5.0}", "zero.config.gradient_clipping is 5.0, but"),
        ("{bf16: {enabled: true}}", "zero.config.bf16.enabled is True, but"),
        ("{train_batch_size: auto}", 'zero.config.train_batch_size is "auto"'),
        (
            "{zero_optimization: {offload_optimizer: {device: cpu}}}",
            "zero.config.zero_optimization.offload_optimizer is set, but isorun decides it by "
            "zero.offload_optimizer",
        ),
        ("{gradient_cliping: 1.0}", "did you mean gradient_clipping?"),
        (
            "{optimizer: {type: Adam}}",
            "zero.config.optimizer is set, but isorun decides it by optim",
        ),
        ("{scheduler: {type: WarmupLR}}", "isorun decides it by schedule"),
    ],
)
def test_contradictory_keys_of_zero_config_are_refused(own, expected):
    with pytest.raises(UsageError) as error:
        generated(f"zero.config={own}")
    assert expected in str(error.value)


@pytest.mark.slow
def test_parameters_shared_between_blocks_stay_shared(tmp_path):
    """fully_shard would shard a copy for each block, which would then train separately."""
    task = ["task.use=tests.faults.tasks:SharedBlocks", "batch.micro_batch_size=6"]
    run("fit", tmp_path / "one", *task)
    run_ranks(2, "fit", tmp_path / "two", *task, "strategy=fsdp2")
    assert_same_bits(tensors(tmp_path / "one"), tensors(tmp_path / "two"))


@pytest.mark.parametrize(
    "strategy", thinned(["ddp", "fsdp2", "zero1", "zero2", "zero3"], kept=["ddp"])
)
def test_a_compiled_model_gives_the_same_run(alone_undropped, tmp_path, strategy):
    run_ranks(2, "fit", tmp_path, *UNDROPPED, f"strategy={strategy}", "compile=true")
    apart = largest_difference(curve(alone_undropped, "train/loss"), curve(tmp_path, "train/loss"))
    assert apart <= 1e-5


UNDROPPED = ["model.dropout=0", "batch.micro_batch_size=6", "length.steps=10"]


@pytest.fixture(scope="module")
def alone_undropped(tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    run("fit", directory, *UNDROPPED)
    return directory


def test_keys_that_deepspeed_does_not_accept_are_refused(tmp_path):
    done = run(
        "fit", tmp_path, "strategy=zero2", "zero.config={zero_optimization: {no_such_key: 1}}",
        expect=64,
    )  # fmt: skip
    assert "DeepSpeed does not accept zero.config: no_such_key is 1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_zero_on_one_process_needs_no_launcher(tmp_path, strategy):
    run("fit", tmp_path, f"strategy={strategy}", "length.steps=5")


@pytest.mark.parametrize(
    ("text", "found"),
    [('{"zero_optimization": {"stage": 3}}', "zero3"), ("{}", "ddp"), ("{", None)],
)
def test_strategy_auto_reads_the_stage_from_accelerate_s_deepspeed_config(
    tmp_path, monkeypatch, text, found
):
    file = tmp_path / "ds.json"
    file.write_text(text)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    if found:
        assert resolve_name("auto", world_size=2) == found
    else:
        with pytest.raises(UsageError, match=r"ds\.json"):
            resolve_name("auto", world_size=2)
