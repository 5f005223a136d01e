"""The code that an attempt runs: its version, its git commit, and the changes since that commit."""
