"""The command `gptfast export`: write a run's model and tokenizer in the layout of Hugging Face transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from gptfast import load_model


@dataclass
class ExportConfig:
    """Write a run's model and tokenizer to a folder that Hugging Face transformers loads with `from_pretrained`."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """Folder to write; it must not exist or be empty."""
    tokenizer: bool = True
    """Write the tokenizer as well."""


def run(config: ExportConfig) -> None:
    """Export the run, then print a summary line."""
    model, tokenizer = load_model.load_run(config.run)
    model.save_pretrained(config.out, tokenizer if config.tokenizer else None)
    parameters = model.get_num_params(non_embedding=False)
    contents = f"a model of {parameters:,} parameters{' and its tokenizer' if config.tokenizer else ''}"
    print(f"{contents} in {config.out}, for transformers' from_pretrained")
