"""Causal language modelling on text files."""
