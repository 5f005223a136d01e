"""Starts runs: on this machine, in Docker, on Slurm and on Kubernetes.

torchx            ->  ``torchx run``: components, named resources, schedulers
kubernetes        ->  the Kubernetes objects of a run, and the scheduler that submits them
agent             ->  runs once per node and starts its ranks
doctor            ->  checks nodes, network and storage before a run
history           ->  the launch log
commands, cli     ->  ``isorun``
contract          ->  everything that this package uses of ``train``
"""
