"""`shardwise.verify`: a model on several ranks beside the same model in one process, and where they first differ.

| | |
|---|---|
| `run` | from arguments to the result: which processes run, and in which order |
| `settings`, `load` | what is verified, and the model and inputs that all processes make of it |
| `proven` | the proof of the plan, before any rank starts |
| `measure`, `one` | what a process computes; what the one process leaves in files for the ranks |
| `checks`, `compare` | the checks on the ranks; how far numbers are apart, and how far they may be |
| `attempt` | code that may raise on all ranks |
| `search`, `record`, `locate` | the module that is the first to differ, from what every module gives, in order |
| `arrange`, `diagnose` | how tensors lie on the ranks; which fault would explain the numbers |
| `judge` | the result, made of all of this |
| `result`, `show` | the result, as data and to read |
"""

from shardwise.verify.result import Check, Culprit, Hypothesis, Verification
from shardwise.verify.run import verify

__all__ = ["Check", "Culprit", "Hypothesis", "Verification", "verify"]
