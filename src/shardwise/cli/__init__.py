"""The program `shardwise`: a file each command, and the program itself in `app`."""

# registers the commands, in the order in which the help shows them
from shardwise.cli import demo, generate, plan, profile, trace, verify
from shardwise.cli.app import app, main

__all__ = ["app", "demo", "generate", "main", "plan", "profile", "trace", "verify"]
