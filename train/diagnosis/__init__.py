"""Short trials of a config outside of a run, which say whether and how well it learns."""
