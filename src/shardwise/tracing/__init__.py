"""`shardwise trace`: the collectives of a model's step, of one rank, of all of them, and beside another run."""
