"""For how many causal-LM types of transformers a plan is inferred and proven, what it cuts, and how long that takes."""
