"""World, process group, collectives, shards and randomness: the base of all other rooms."""
