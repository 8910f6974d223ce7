"""Plans for models that have none, inferred from what the model computes, and proven.

| | |
|---|---|
| `products`, `trace` | the products with parameters; a forward pass, cut at each of them |
| `probe`, `sampled` | which outputs of products an input of a later one depends on; of wide ones, found from samples |
| `islands`, `blocks` | what falls apart into components: heads, KV groups, channels; the same among blocks and samples |
| `known`, `twins` | modules that are dealt as we know (state-space mixers, recurrent units); layers tied to others |
| `layouts`, `targets`, `proposals`, `ends` | components as blocks, what rules name, islands as rules, and the vocabulary |
| `simulate`, `compare`, `figures`, `proof` | every rank on a thread, and how far what they compute is apart |
| `parts` | a plan taken apart, for what is wrong in it |
| `given` | products whose weights are too large to be made: what comes out of them is given |
| `search`, `lengths` | what modules need besides cut weights, such as the lengths of those that are cut |
| `choose`, `lift` | what passes; and for all layers |
| `plan`, `prove` | what is called; rules of the user's own, tried out before a weight is read |
| `subject`, `values`, `feeds` | what plans are tried out on |
| `surroundings` | what they are tried out under |
| `switched` | modules that a model exchanges for others |
| `unknown`, `named` | what `tp_plan="auto"` does of a model without a plan, or with one for a part of it |
"""

from shardwise.infer.choose import Inference
from shardwise.infer.plan import infer, infer_plan
from shardwise.infer.proof import Island, Proof
from shardwise.infer.prove import examine, facts, prove, prove_rules
from shardwise.infer.unknown import LEAST, cut_share, plan_brought, plan_rest, plan_unknown

__all__ = [
    "LEAST",
    "Inference",
    "Island",
    "Proof",
    "cut_share",
    "examine",
    "facts",
    "infer",
    "infer_plan",
    "plan_brought",
    "plan_rest",
    "plan_unknown",
    "prove",
    "prove_rules",
]
