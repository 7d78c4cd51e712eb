"""Everything on disk: atomic files, run folders, training checkpoints, checkpoints of nanoGPT."""
