"""Finds what would make a run fail before it starts: ``isorun doctor -- python -m train ...``.

cli           the command line and the exit code
examination   the order of the checks
rendezvous    how the ranks find each other and exchange results
checks/       the checks, by subject: those of one node, and those between nodes
findings      the results of checks
table         the findings as a table

The doctor checks what a training will use. So it reads the world, the config and the version of
the code with ``train``'s own functions, and starts the same kind of process group.
"""
