"""The commands of ``python -m launch``, one per file."""
