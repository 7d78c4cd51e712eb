"""What a run begins with: data, tokenizer, model, and the settings that fit them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from gptfast import tokenizers
from gptfast.checkpoint import run_folder
from gptfast.checkpoint.atomic_files import read_json
from gptfast.checkpoint.manager import Checkpoints
from gptfast.data import batches, corpus, shards
from gptfast.data.batches import Split
from gptfast.model import GPT
from gptfast.tokenizers import Tokenizer
from gptfast.training import finetuning
from gptfast.training.config import FIXED, TrainConfig


class Start:
    """What a run begins with.

    Args:
        config: the settings, which are the run's own where `config.resume` finds one.
        device: where the model is to be.
        asked: choices of the backend, parsed.

    Attributes:
        config: the settings, with the vocabulary of the tokenizer and the size of the weights given.
        tokenizer: the run's.
        train_split: what is trained on.
        val_split: what is held out.
        model: on the device, with its first weights.

    Raises:
        ValueError: settings, data or weights that are wrong or do not fit each other.
    """

    def __init__(self, config: TrainConfig, device: torch.device, asked: dict[str, str]) -> None:
        saved = Path(config.out) if config.resume and config.out and run_folder.is_run(Path(config.out)) else None
        # what a run began with is in its checkpoints, and need no longer be there
        begins = saved is None or not Checkpoints(saved / "checkpoints", 1).exist()
        initial = finetuning.initial(config.init_from, config.model) if config.init_from and begins else None
        tokenizer = initial.tokenizer if initial else None
        if saved is not None:
            tokenizer = tokenizers.from_json(read_json(saved / "tokenizer.json"))
        self.tokenizer, self.train_split, self.val_split = _load(config, tokenizer)
        if config.sample_tokens and config.sample_prompt:
            _require_tokens(self.tokenizer, config.sample_prompt)
        if initial is not None:
            finetuning.require_vocabulary(initial, self.tokenizer)
            shape = initial.model.config
        elif config.init_from and saved is not None:
            shape = finetuning.shaped(run_folder.read_config(saved)[1], config.model)
        else:
            shape = dataclasses.replace(config.model, vocab_size=self.tokenizer.vocab_size)
        self.config = dataclasses.replace(config, model=shape)
        if saved is not None:
            _require_same(self.config, saved)
        torch.manual_seed(config.seed)
        self.model = GPT(shape, asked) if initial is None else initial.model
        self.model.to(device).set_backend(asked)
        if config.residual_dtype != "auto":
            self.model.set_residual_dtype(getattr(torch, config.residual_dtype))
        self.model.set_activation_checkpointing(config.checkpoint_activations)
        finetuning.restrict(self.model, self.config)


def _require_tokens(tokenizer: Tokenizer, prompt: str) -> None:
    """Raise ValueError unless samples can continue a prompt."""
    try:
        ids = tokenizer.encode(prompt)
    except ValueError as error:
        raise ValueError(f"sample_prompt {prompt!r}: {error}; give another with --sample-prompt") from error
    if len(ids) == 0:
        raise ValueError(f"sample_prompt {prompt!r} has no tokens; give at least one word with --sample-prompt")


def _require_same(config: TrainConfig, path: Path) -> None:
    """Raise ValueError unless the settings are those of the run in a folder, but for what may change."""
    settings, model = run_folder.read_config(path)
    saved, ours = ({**one, "pad_vocab_size_to": None} for one in map(dataclasses.asdict, (model, config.model)))
    saved |= {name: settings.get(name) for name in FIXED}
    ours |= {name: getattr(config, name) for name in FIXED}
    for name, given in ours.items():
        given = list(given) if isinstance(given, tuple) else given
        if given != saved[name]:
            raise ValueError(
                f"the run in {path} has {name}={saved[name]!r}, which cannot change to {given!r}; give a new --out"
            )


def _load(config: TrainConfig, tokenizer: Tokenizer | None) -> tuple[Tokenizer, Split, Split]:
    """The tokenizer, unless it is given, and the splits of training and validation."""
    folder, block_size = Path(config.data).expanduser(), config.model.block_size
    if not (folder.is_dir() and shards.is_prepared(folder)):
        text = corpus.load(config.data)
        if tokenizer is None:
            tokenizer = tokenizers.for_documents(config.tokenizer, [text], vocabulary=config.vocabulary)
        ids = tokenizer.encode(text).astype(shards.DTYPES[shards.dtype_for(tokenizer.vocab_size)])
        return tokenizer, *batches.split(ids, block_size, config.held_out)
    saved = folder / "tokenizer.json"
    if saved.is_file():
        own = tokenizers.from_json(read_json(saved))
        if tokenizer is not None and tokenizer.to_json() != own.to_json():
            raise ValueError(f"{folder} was prepared with another tokenizer than the model's; prepare the text with it")
        tokenizer = own
    elif tokenizer is None and config.tokenizer in ("char", "word"):
        raise ValueError(
            f"{folder} has no tokenizer.json, and {config.tokenizer!r} cannot be told from its tokens; give "
            "--tokenizer gpt2 if these are GPT-2's, or prepare the text again"
        )
    elif tokenizer is None:
        tokenizer = tokenizers.for_documents(config.tokenizer, [], vocabulary=config.vocabulary)
    splits = batches.prepared(folder, block_size)
    largest = max(int(split.probe().max()) for split in splits)
    if largest >= tokenizer.vocab_size:
        raise ValueError(
            f"{folder} has a token {largest}, and {config.tokenizer!r} {tokenizer.vocab_size} of them; give the "
            "tokenizer that it was prepared with"
        )
    return tokenizer, *splits
