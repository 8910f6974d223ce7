"""What it takes to plan the largest models and to make them parallel, and what a rank would then hold and send.

Nothing is allocated: models are built on meta and made parallel there, as one rank on torch's fake process group; a training
step runs on fake tensors. `python -m benchmarks.scale` measures every case in a process of its own.
"""
