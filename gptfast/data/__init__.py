"""Training data: texts, token shards on disk, batches."""
