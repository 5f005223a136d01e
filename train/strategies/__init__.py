"""How a model's parameters, gradients and optimiser state are sharded over the ranks.

A strategy changes where tensors are and when ranks communicate, never what is computed: each takes
the same losses, and each shows its tensors to checkpoints as
:class:`train.distributed.shard.Shard`.
"""
