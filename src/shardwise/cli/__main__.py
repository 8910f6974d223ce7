"""`python -m shardwise.cli`: the program without its entry point."""

from shardwise.cli import main

main()
