"""Composes files and overrides into one validated config that knows the origin of each value."""
