"""Continuing texts: from strings to strings, whole or piece by piece."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gptfast.generation import generate
from gptfast.generation.decoder import CausalLM, device_of
from gptfast.generation.detokenizer import TextStream
from gptfast.generation.sampling import Sampling
from gptfast.generation.speculative import Draft
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
        score: of a search by beams, which gives no log-probabilities of single tokens.
    """

    prompt: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finished: bool = False
    score: float | None = None


def generate_text(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    settings: Sampling | None = None,
    stop: Sequence[str] = (),
    generator: torch.Generator | None = None,
    draft: Draft | None = None,
    compiled: bool = False,
) -> str:
    """Continue a text, until a stop string or the end of the document; what is added, without either.

    Arguments and errors are those of `stream`.
    """
    pieces = stream(model, tokenizer, [Text(prompt)], max_new_tokens, settings, stop, generator, draft, compiled)
    return "".join(piece for _, piece in pieces)


def stream(
    model: CausalLM,
    tokenizer: Tokenizer,
    texts: Sequence[Text],
    max_new_tokens: int,
    settings: Sampling | None = None,
    stop: Sequence[str] = (),
    generator: torch.Generator | None = None,
    draft: Draft | None = None,
    compiled: bool = False,
) -> Iterator[tuple[int, str]]:
    """Continue texts together, and fill them in.

    Args:
        model: the GPT.
        tokenizer: of the model.
        texts: prompts of any lengths; one without tokens, as space is among words, stands for the end of a document
            before, where the tokenizer has a token for that.
        max_new_tokens: the most to add to each.
        settings: how tokens are drawn.
        stop: strings before which a continuation ends.
        generator: makes the sampling repeatable; on the model's device.
        draft: a smaller model of the same tokenizer that proposes tokens; some texts get ahead of others then.
        compiled: put a step through torch.compile, which takes a minute at the first of each shape.

    Returns:
        The number of a text, and a piece of its continuation that is certain: no piece splits a character, and none is
        the beginning of a stop string.

    Raises:
        ValueError: a setting out of range, an empty prompt that nothing stands for, or one the tokenizer has no tokens
            for.
    """
    end = tokenizer.end_of_text
    prompts, idx, lengths = _encode(model, tokenizer, texts)
    streams = [TextStream(tokenizer, stop, after=ids[-1]) for ids in prompts]

    def ends(row: int, token: int) -> bool:
        return texts[row].finished

    arguments = (idx, lengths, max_new_tokens, settings, ends, generator)
    for step in generate.follow(model, draft, compiled, *arguments):
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


def search(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    num_beams: int,
    length_penalty: float = 1.0,
    settings: Sampling | None = None,
    num_samples: int = 1,
) -> list[Text]:
    """The likeliest continuations of texts, each up to the end of the document.

    Args:
        model: the GPT.
        tokenizer: of the model.
        prompts: of any lengths, as in `stream`.
        max_new_tokens: the most to add to each.
        num_beams: open beginnings of each.
        length_penalty: above 0 favours long continuations, below 0 short ones; see `beam_search.search`.
        settings: penalties and the blocking of n-grams.
        num_samples: continuations of each prompt, best first; at most `num_beams`.

    Returns:
        `num_samples` texts for each prompt, with their scores.

    Raises:
        ValueError: as `stream`, and for settings of sampling, which beams exclude.
    """
    end = tokenizer.end_of_text
    stops = [] if end is None else [end]
    texts = [Text(prompt) for prompt in prompts]
    ids, idx, lengths = _encode(model, tokenizer, texts)
    found = generate.search_beams(
        model, idx, lengths, max_new_tokens, num_beams, length_penalty, stop_tokens=stops,
        num_return_sequences=num_samples, settings=settings,
    )  # fmt: skip
    written: list[Text] = []
    for prompt, before, hypotheses in zip(prompts, ids, found, strict=True):
        for hypothesis in hypotheses:
            pieces = TextStream(tokenizer, after=before[-1])
            text = "".join([*(pieces.push(token) for token in hypothesis.tokens if token != end), pieces.flush()])
            tokens, finished = hypothesis.tokens, hypothesis.finished
            score = hypothesis.score if math.isfinite(hypothesis.score) else None  # there is none
            written.append(Text(prompt, text, tokens, finished=finished, score=score))
    return written


def _encode(model: CausalLM, tokenizer: Tokenizer, texts: Sequence[Text]) -> tuple[list[list[int]], Tensor, list[int]]:
    """The prompts' tokens, the same padded [B, T] int64 on the model's device, and how many they are."""
    prompts = [_ids(tokenizer, text.prompt) for text in texts]
    lengths = [len(ids) for ids in prompts]
    longest = max(lengths, default=1)
    padded = [ids + [0] * (longest - len(ids)) for ids in prompts]
    device = device_of(model)
    return prompts, torch.tensor(padded, device=device).view(len(texts), longest), lengths


def _ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    ids = tokenizer.encode(prompt).tolist()
    if not ids and tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    if not ids:
        raise ValueError(f"the prompt {prompt!r} has no tokens; give at least one character")
    return ids
