"""How a model's parameters, gradients and optimiser state are spread over the ranks.

A strategy changes where things lie and when ranks talk, never what is computed: each takes the
same losses, and each shows its tensors to checkpoints as :class:`train.distributed.shard.Shard`.
"""
