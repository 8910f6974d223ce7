"""Every causal-LM type that has a plan, on several ranks beside one process: the checks, the table, the documentation."""
