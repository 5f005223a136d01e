"""Hand-written trainings on several ranks: DDP, FSDP2 and DeepSpeed.

Options such as bucket sizes are those of isorun, so that only the loop differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.contenders import CLIP, Train, take_steps

if TYPE_CHECKING:
    from benchmarks.workload import Workload


@contextmanager
def process_group(work: Workload) -> Iterator[None]:
    """A context manager for the process group: NCCL on GPUs, else gloo."""
    import torch
    import torch.distributed as dist

    if work.device.type == "cuda":
        torch.cuda.set_device(work.device)
    dist.init_process_group("nccl" if work.device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def raw_ddp(work: Workload) -> None:
    """Wraps the model in DistributedDataParallel."""
    from torch.nn.parallel import DistributedDataParallel

    with process_group(work):
        model = DistributedDataParallel(
            work.model(), broadcast_buffers=False, gradient_as_bucket_view=True
        )
        take_steps(work, model, work.optimizer(model.module))


def raw_fsdp2(work: Workload) -> None:
    """Applies ``fully_shard`` to each block and to the model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with process_group(work):
        mesh = init_device_mesh(work.device.type, (work.world_size,))
        model = work.model()
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        take_steps(work, model, work.optimizer(model))


def raw_zero(stage: int, work: Workload) -> None:
    """DeepSpeed's engine with its own clipping, as in its documentation."""
    from train.strategies.deepspeed_import import import_deepspeed

    deepspeed = import_deepspeed(work.device)
    with process_group(work):
        model = work.model()
        micro_batch = work.size.batch // work.world_size
        engine, optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=work.optimizer(model),
            config={
                "train_micro_batch_size_per_gpu": micro_batch,
                "gradient_clipping": CLIP,
                "zero_optimization": {
                    "stage": stage,
                    "overlap_comm": True,
                    "reduce_bucket_size": 50_000_000,
                    "allgather_bucket_size": 50_000_000,
                    **({"stage3_param_persistence_threshold": 10_000} if stage == 3 else {}),
                },
                "steps_per_print": 2**62,
            },
        )
        rate = work.loaded.config.optim.lr
        for step, batch in enumerate(work.loader()):
            for group in optimizer.param_groups:
                group["lr"] = rate * work.factor(step)
            engine.backward(work.loss(engine, batch))
            engine.step()


RAW: dict[str, Train] = {
    "ddp": raw_ddp,
    "fsdp2": raw_fsdp2,
    "zero1": partial(raw_zero, 1),
    "zero2": partial(raw_zero, 2),
    "zero3": partial(raw_zero, 3),
}
"""Hand-written training by the name of isorun's strategy."""
