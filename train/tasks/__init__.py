"""Tasks: what a run computes. See :mod:`train.tasks.base`."""
