"""Finding a checkpoint's files, safetensors or `.bin`, and opening them without reading a weight.

Every tensor becomes a `LazyTensor` over a memory mapping, so that reading a box touches only the pages that it lies on. What
can be wrong with the files themselves is found when they are opened, from their headers.
"""

from shardwise.checkpoint.find import CheckpointFiles, find_checkpoint
from shardwise.checkpoint.fingerprint import fingerprint
from shardwise.checkpoint.open import open_checkpoint, read_whole
from shardwise.checkpoint.quantized import dequantized
from shardwise.checkpoint.source import FileSource

__all__ = ["CheckpointFiles", "FileSource", "dequantized", "find_checkpoint", "fingerprint", "open_checkpoint", "read_whole"]
