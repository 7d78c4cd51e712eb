"""The command `gptfast export`: write a run's model and tokenizer for Hugging Face's transformers."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from gptfast import load_model


@dataclass
class ExportConfig:
    """Write the model and the tokenizer of a run for Hugging Face's transformers."""

    run: tyro.conf.Positional[str]
    """Run folder."""
    out: tyro.conf.Positional[str]
    """Folder to write; it must not exist or be empty."""
    tokenizer: bool = True
    """Write the tokenizer too."""


def run(config: ExportConfig) -> None:
    """Export the run, then print a summary line.

    Raises:
        ValueError: no run folder, a model or tokenizer that GPT-2's format cannot hold, or an output folder in use.
        OSError: the folder cannot be written.
    """
    model, tokenizer = load_model.load_run(config.run)
    model.save_pretrained(config.out, tokenizer if config.tokenizer else None)
    parameters = model.get_num_params(non_embedding=False)
    contents = f"a model of {parameters:,} parameters{' and its tokenizer' if config.tokenizer else ''}"
    print(f"{contents} in {config.out}, for transformers' from_pretrained")
