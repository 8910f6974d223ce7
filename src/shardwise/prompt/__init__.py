"""`shardwise generate`: a model on several ranks continues a text."""
