"""Making a transformers model from lazy tensors. With `hf.py` the only code that touches transformers' internals."""

from shardwise.hf_loading.auto import attach_generation_config, refuse_quantized, resolve_model_class
from shardwise.hf_loading.load import load_lazily

__all__ = ["attach_generation_config", "load_lazily", "refuse_quantized", "resolve_model_class"]
