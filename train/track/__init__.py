"""Metrics, reports and logs: one tracker and several sinks, which cannot stop the training."""
