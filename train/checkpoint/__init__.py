"""Checkpoints: transactions on disk that know nothing of the placement that wrote them."""
