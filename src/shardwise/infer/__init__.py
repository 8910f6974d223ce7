"""Plans for models that have none, inferred from what the model computes, and proven.

| | |
|---|---|
| `products` | a forward pass, cut at every product with a parameter |
| `probe` | which outputs of products an input of a later one depends on |
| `islands` | what falls apart into components: heads, KV groups, channels |
| `known`, `twins` | modules that are dealt as we know: state-space mixers; layers that are tied to others |
| `layouts`, `proposals`, `ends` | components as blocks, islands as rules, and the vocabulary |
| `simulate`, `search`, `choose` | every rank on a thread; what modules need besides cut weights; what passes |
| `switched` | modules that a model exchanges for others |
| `plan`, `prove`, `subject` | what is called, and what plans are tried out on |
| `unknown` | what `tp_plan="auto"` does of a model without a plan |
"""

from shardwise.infer.choose import Inference
from shardwise.infer.plan import infer, infer_plan
from shardwise.infer.prove import prove
from shardwise.infer.simulate import Proof
from shardwise.infer.unknown import LEAST, cut_share, plan_unknown

__all__ = ["LEAST", "Inference", "Proof", "cut_share", "infer", "infer_plan", "plan_unknown", "prove"]
