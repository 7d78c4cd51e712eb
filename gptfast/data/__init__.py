"""Texts to train on: where they are from, their tokens on disk, batches of them."""
