"""Optimiser, learning-rate schedule, and exponential moving average of the weights."""
