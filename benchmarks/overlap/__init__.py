"""What `overlap=True` hides of a slow network: `python -m benchmarks.overlap`."""
