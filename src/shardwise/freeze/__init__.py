"""How frozen plans are made: inferred on a tiny model, put into names, and proven on models of other sizes and options.

| | |
|---|---|
| `sizes` | other configs of a type: all sizes different, other options |
| `express` | numbers as expressions of names that hold in all of several models |
| `make` | the file of a type |
"""

from shardwise.freeze.make import freeze
from shardwise.freeze.found import NotFrozen

__all__ = ["NotFrozen", "freeze"]
