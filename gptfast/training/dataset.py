"""Tokenizer, training split and validation split of a run."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from gptfast import tokenizers
from gptfast.checkpoint.atomic_files import read_json
from gptfast.data import batches, corpus, shards
from gptfast.data.batches import Split
from gptfast.tokenizers import Tokenizer
from gptfast.training.config import TrainConfig


@dataclass(frozen=True)
class Dataset:
    """A tokenized text.

    Args:
        tokenizer: the tokenizer of both splits.
        train: training split.
        val: validation split; the same object as `train` if nothing is held out.
    """

    tokenizer: Tokenizer
    train: Split
    val: Split

    @property
    def has_held_out(self) -> bool:
        """True if validation uses text that training does not see."""
        return self.val is not self.train

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprint of each split; a resumed run compares them."""
        return {"train": self.train.fingerprint(), "val": self.val.fingerprint()}


def load(config: TrainConfig, tokenizer: Tokenizer | None = None) -> Dataset:
    """Load the text that the config names, with a pretrained model's tokenizer or the config's.

    Raises:
        ValueError: the data is missing, too short, or does not fit the tokenizer.
    """
    folder, block_size = Path(config.data).expanduser(), config.model.block_size
    if folder.is_dir() and shards.is_prepared(folder):
        tokenizer = _shard_tokenizer(folder, config, tokenizer)
        dataset = Dataset(tokenizer, *batches.open_prepared(folder, block_size))
        largest = max(int(split.probe().max()) for split in (dataset.train, dataset.val))
        if largest >= tokenizer.vocab_size:
            raise ValueError(
                f"{folder} has token id {largest}, but the tokenizer {config.tokenizer!r} has {tokenizer.vocab_size} "
                "tokens; give --tokenizer as in the preparation of the data"
            )
        return dataset
    text = corpus.load_text(config.data)
    if tokenizer is None:
        tokenizer = tokenizers.for_documents(config.tokenizer, [text], vocabulary=config.vocabulary)
    ids = tokenizer.encode(text).astype(shards.DTYPES[shards.dtype_for(tokenizer.vocab_size)])
    return Dataset(tokenizer, *batches.split_tokens(ids, block_size, config.held_out))


def _shard_tokenizer(folder: Path, config: TrainConfig, tokenizer: Tokenizer | None) -> Tokenizer:
    """Return the tokenizer of a folder of shards; nanoGPT's folders have none."""
    saved = folder / "tokenizer.json"
    if saved.is_file():
        own = tokenizers.from_json(read_json(saved))
        if tokenizer is not None and tokenizer.to_json() != own.to_json():
            raise ValueError(f"{folder} was prepared with another tokenizer than the model's; prepare the text with it")
        return own
    if tokenizer is not None:
        return tokenizer
    if config.tokenizer in ("char", "word"):
        raise ValueError(
            f"{folder} has no tokenizer.json, which tokenizer {config.tokenizer!r} needs; give --tokenizer gpt2 if the "
            "tokens are GPT-2's, or prepare the text again"
        )
    return tokenizers.for_documents(config.tokenizer, [], vocabulary=config.vocabulary)
