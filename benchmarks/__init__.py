"""What tensor parallelism costs, beside the peers and the bounds, all in one run: `python -m benchmarks` says how.

`contenders` are what is compared, each behind an adapter; `workloads` say what is measured, as data; `tasks` do it, in the
contender's own interpreter. `benchmarks.gpu` is the part for one GPU.
"""
