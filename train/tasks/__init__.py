"""Tasks: model, data, loss and metrics of a run. See :mod:`train.tasks.base`."""
