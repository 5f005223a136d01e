"""Comparison of one run on several placements."""
