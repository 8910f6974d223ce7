"""`shardwise demo`: a training on several ranks beside the same in one process, and everything that must hold between them."""
