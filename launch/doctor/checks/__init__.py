"""The checks, by subject.

Those of a node for itself (environment, memory, the node's devices and storage, tracking) take a
Place. Those between nodes take the Meeting as well, and are called on all ranks that take part.
"""
