"""The node agent: runs once on each node, starts its ranks, and returns how they ended.

torch's elastic agent does the rendezvous and starts the ranks. This package adds exit codes that
are passed on, restarts only where they can help, a stop request that reaches each rank once, the
error of the rank that failed first, and a preflight check of the nodes.
"""
