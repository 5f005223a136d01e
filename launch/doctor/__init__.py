"""What can be known to be wrong before a run: ``python -m launch.doctor -- python -m train ...``.

cli           the command line, and what the process ends with
examination   the order of the checks
meeting       how the ranks find each other and exchange what they found
checks/       the checks, by subject: those of a node for itself, and those between nodes
findings      what a check says; table and JSON of all of them

The doctor looks at what a training will use. So it reads the world, the config and the code's
version by ``train``'s own functions, and starts the same kind of process group.
"""
