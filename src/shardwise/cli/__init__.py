"""The program `shardwise`: a file each command, and the program itself in `app`."""

# registers the commands, in the order in which the help shows them
from shardwise.cli import demo, freeze, generate, plan, profile, trace, verify
from shardwise.cli.app import app, main

__all__ = ["app", "demo", "freeze", "generate", "main", "plan", "profile", "trace", "verify"]
