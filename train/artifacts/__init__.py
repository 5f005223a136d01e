"""Artifacts of Weights & Biases."""
