"""The life of one process: requests to stop, hangs, and what its end means."""
