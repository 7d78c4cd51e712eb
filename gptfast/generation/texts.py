"""Continuing texts: from strings to strings, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from gptfast.generation.sampling import Sampling
from gptfast.generation.steps import steps
from gptfast.generation.streaming import TextStream
from gptfast.model import GPT
from gptfast.tokenizers import Tokenizer


@dataclass
class Text:
    """A continuation of a prompt.

    Args:
        prompt: what it continues.
        text: what was added, without the stop string or the token at the end of a document that ended it.
        tokens: the new ones, with those.
        log_probs: the model's log-probability of each of them.
        finished: a stop string or the end of a document ended it.
    """

    prompt: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finished: bool = False


def generate_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    settings: Sampling | None = None,
    stop: Sequence[str] = (),
    generator: torch.Generator | None = None,
) -> str:
    """Continue a text, until a stop string or the end of the document; what is added, without either.

    Arguments and errors are those of `stream`.
    """
    pieces = stream(model, tokenizer, [Text(prompt)], max_new_tokens, settings, stop, generator)
    return "".join(piece for _, piece in pieces)


def stream(
    model: GPT,
    tokenizer: Tokenizer,
    texts: Sequence[Text],
    max_new_tokens: int,
    settings: Sampling | None = None,
    stop: Sequence[str] = (),
    generator: torch.Generator | None = None,
) -> Iterator[tuple[int, str]]:
    """Continue texts together, and fill them in.

    Args:
        model: the GPT.
        tokenizer: of the model.
        texts: prompts of any lengths; an empty one stands for the end of a document before, where the tokenizer has a
            token for that.
        max_new_tokens: the most to add to each.
        settings: how tokens are drawn.
        stop: strings before which a continuation ends.
        generator: makes the sampling repeatable; on the model's device.

    Returns:
        The number of a text, and a piece of its continuation that is certain: no piece splits a character, and none is
        the beginning of a stop string.

    Raises:
        ValueError: a setting out of range, an empty prompt that nothing stands for, or one the tokenizer has no tokens
            for.
    """
    end = tokenizer.end_of_text
    prompts = [_ids(tokenizer, text.prompt) for text in texts]
    lengths = [len(ids) for ids in prompts]
    longest = max(lengths, default=1)
    padded = [ids + [0] * (longest - len(ids)) for ids in prompts]
    idx = torch.tensor(padded, device=model.lm_head.weight.device).view(len(texts), longest)
    streams = [TextStream(tokenizer, stop, after=ids[-1]) for ids in prompts]

    def ends(row: int, token: int) -> bool:
        return texts[row].finished

    for step in steps(model, idx, lengths, max_new_tokens, settings, ends, generator):
        for row, token, log_prob in zip(*step, strict=True):
            text = texts[row]
            text.tokens.append(token)
            text.log_probs.append(log_prob)
            # the token at the end of a document has no text
            piece = streams[row].flush() if token == end else streams[row].push(token)
            text.finished = token == end or streams[row].finished
            if piece:
                text.text += piece
                yield row, piece
    for row, text in enumerate(texts):
        piece = "" if text.finished else streams[row].flush()
        if piece:
            text.text += piece
            yield row, piece


def _ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    if not prompt and tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    ids = tokenizer.encode(prompt).tolist()
    if not ids:
        raise ValueError(f"the prompt {prompt!r} has no tokens; give at least one character")
    return ids
