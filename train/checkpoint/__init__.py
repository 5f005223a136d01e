"""Transactional checkpoints that any placement can write and read."""
