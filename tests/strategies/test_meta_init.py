"""Initial weights that are drawn module by module."""

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.faults.tasks import ByModule
from tests.support.forked import run, run_ranks
from tests.support.lanes import slow
from tests.support.runs import assert_same_bits, tensors, tiny_config
from train.strategies.meta_init import build_model

TASK = ["task.use=tests.faults.tasks:ByModule", "batch.micro_batch_size=6"]


def test_values_depend_only_on_seed_and_name():
    model, initial, _ = build_model(ByModule(tiny_config()), seed=3)
    assert all(tensor.is_meta for tensor in model.parameters())
    drawn = {name: module for name, module in initial.modules() if name}
    again = dict(initial.modules())
    assert set(drawn) == {"first", "blocks.0", "blocks.1", "blocks.2", "out"}
    for name, module in drawn.items():
        assert torch.equal(module.weight, again[name].weight)
    assert not torch.equal(drawn["blocks.0"].weight, drawn["blocks.1"].weight)
    _, other, _ = build_model(ByModule(tiny_config()), seed=4)
    assert not torch.equal(dict(other.modules())["out"].weight, drawn["out"].weight)
    initial.fill(model, torch.device("cpu"))
    assert model.blocks[2].weight is model.blocks[0].weight
    assert torch.equal(model.blocks[0].weight, drawn["blocks.0"].weight)
    assert not model.out.bias.requires_grad
    assert model.scale.tolist() == [0.5] * 4


def test_only_the_shards_are_offloaded():
    """Forward needs buffers and parameters without dimensions on the device, here "meta"."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model, initial, _ = build_model(ByModule(tiny_config()), seed=3)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)), ignored_params={model.out.bias})
        initial.fill(model, torch.device("meta"), torch.device("cpu"))
        drawn = {name: module for name, module in initial.modules() if name}
        weight = model.first.weight.to_local()
        assert weight.device.type == "cpu"
        assert torch.equal(weight, drawn["first"].weight)
        assert model.out.bias.is_meta
        assert all(buffer.is_meta for buffer in model.buffers())
        assert dict(model.named_buffers())
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    run("fit", directory, *TASK)
    return directory


@pytest.mark.parametrize(
    "options",
    [slow(["strategy=ddp"]), slow(["strategy=fsdp2"]), slow(["strategy=fsdp2", "fsdp2.cpu_offload=true"]),
     slow(["strategy=zero1"]), ["strategy=zero3"],
     slow(["strategy=zero3", "zero.offload_parameters=cpu"])],
    ids=" ".join,
)  # fmt: skip
def test_every_strategy_starts_from_the_same_weights(alone, tmp_path, options):
    run_ranks(2, "fit", tmp_path, *TASK, *options)
    one, two = tensors(alone), tensors(tmp_path)
    if "zero" in options[0]:
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
    else:
        assert_same_bits(one, two)


@pytest.mark.slow
def test_it_resumes_on_other_placements(alone, tmp_path):
    run_ranks(2, "fit", tmp_path, *TASK, "strategy=zero3", "length.steps=20")
    run("fit", tmp_path, *TASK, "--allow-changes")
    assert tensors(tmp_path).keys() == tensors(alone).keys()


@pytest.mark.parametrize(
    ("task", "said"),
    [("ByModuleWithValues", "must not assign values to tensors, but table has values"),
     ("ByModuleUnknown", "init_module does not initialise the Sequential '(the model itself)'")],
)  # fmt: skip
def test_models_that_cannot_be_initialised_this_way_are_refused(tmp_path, task, said):
    done = run("fit", tmp_path, f"task.use=tests.faults.tasks:{task}", expect=64)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
