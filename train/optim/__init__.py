"""The optimiser, the learning rate over the run, and an average of the weights."""
