"""The same run on several placements, compared."""
