"""Write an ordinary Hugging Face checkpoint one tensor at a time.

    plan = plan_files(entries, max_shard_size="5GB")              # pure: the same on every rank
    with CheckpointWriter(directory, plan) as writer:             # on the rank that writes
        for entry in plan.entries:
            writer.write(entry, full_tensor(entry.name))          # goes to the disk at once; or some rows at a time
        writer.add_file("config.json", config)

The files are byte for byte those of `safetensors.torch.save_file`, under transformers' names. They appear in the directory when
the block ends, all together; a block left by an exception, or killed, leaves the earlier checkpoint as it was.

| | |
|---|---|
| `writer` | the block above |
| `shard_files` | which tensors go into which files, the files' names and headers |
| `staging` | the hidden directory where everything is written first |
| `publish` | how it takes the earlier checkpoint's place |
"""

from shardwise.storage.shard_files import Entry, FilePlan, Names, ShardFile, plan_files
from shardwise.storage.writer import CheckpointWriter

__all__ = ["CheckpointWriter", "Entry", "FilePlan", "Names", "ShardFile", "plan_files"]
