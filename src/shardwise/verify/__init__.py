"""`shardwise.verify`: a model on several ranks beside the same model in one process, and where they first differ.

| | |
|---|---|
| `settings`, `load` | what is verified, and the model and inputs that all processes make of it |
| `measure`, `one`, `checks` | what one process finds and leaves in files; what the ranks find; the checks |
| `compare` | how far numbers are apart, and how far they may be |
| `record`, `places`, `locate` | what every module gives, in order; how it lies on the ranks; the first that differs |
| `diagnose` | which fault would explain the numbers |
| `run`, `show` | from arguments to the result; the result to read |
"""

from shardwise.verify.result import Check, Culprit, Hypothesis, Verification
from shardwise.verify.run import verify

__all__ = ["Check", "Culprit", "Hypothesis", "Verification", "verify"]
