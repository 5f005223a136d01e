"""This process among all processes of a run: its place, their group, what they exchange."""
