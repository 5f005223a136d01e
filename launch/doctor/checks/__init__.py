"""The checks, by subject.

Checks of one node take a Place. Checks between nodes take the Rendezvous as well, and are called
on all ranks that take part.
"""
