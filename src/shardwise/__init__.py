"""Tensor parallelism for Hugging Face transformers in plain tensors."""
