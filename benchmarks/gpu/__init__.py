"""What a rank of tensor parallelism costs on one GPU, kernels and host, without a network.

Each backend runs as one rank of tp=2 and of tp=8 on torch's fake process group, whose collectives return at once: what is
measured is everything but the wait for others. `python -m benchmarks.gpu FOLDER` says how.
"""
