"""How frozen plans are made: put into names that hold in models of several sizes, and proven; and whether they still hold.

| | |
|---|---|
| `sizes` | other configs of a type: all sizes different, a number or an option another one |
| `found` | what was found of several models, a family of modules at a time |
| `express` | numbers as expressions of names that hold in all of several models |
| `numbers`, `rules` | cuts and numbers as text, rules as lines |
| `own`, `recorded` | the plan that a type brings, with our corrections: a file to be read |
| `inferred` | the plan that is inferred where a type brings none that is right: a file that `auto` uses |
| `make` | which of them the file of a type is |
| `compare` | whether a file still says what `auto` does |
"""

from shardwise.freeze.compare import NotBuilt, drift
from shardwise.freeze.found import NotFrozen
from shardwise.freeze.make import freeze

__all__ = ["NotBuilt", "NotFrozen", "drift", "freeze"]
