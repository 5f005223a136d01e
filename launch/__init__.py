"""Who starts a run, and where. Knows ``train`` by its command line, config schema and exit codes.

components, resources  ->  TorchX: what is to be started
kubernetes             ->  the objects that a cluster is given
agent                  ->  what runs on each node, and starts the ranks
doctor                 ->  what can be known to be wrong before a run
"""
