"""What a run tells: one tracker, several sinks, none of which can stop the training."""
