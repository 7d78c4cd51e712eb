"""Continuations of texts: whole, streamed or by beam search."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gptfast.generation import generate
from gptfast.generation.beam_search import BeamSearch
from gptfast.generation.decoder import CausalLM, GenerationRequest, device_of
from gptfast.generation.detokenizer import TextStream
from gptfast.generation.sampling import Sampling
from gptfast.generation.speculative import Draft
from gptfast.tokenizers import Tokenizer


@dataclass
class Text:
    """A prompt and its continuation.

    Args:
        prompt: the given text.
        text: the continuation, without the stop string or end-of-text token that ended it.
        tokens: the new tokens, including those of the stop string.
        log_probs: the model's log-probability of each token.
        finished: True if a stop string or the end-of-text token ended it.
        score: of a beam search, which has no log-probabilities of single tokens.
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
    """Continue a text up to a stop string or the end-of-text token, and return the continuation without either.

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
    """Continue texts together, fill them in, and yield their pieces as soon as no later token can change them.

    Args:
        model: the GPT.
        tokenizer: the model's.
        texts: prompts of any lengths. A prompt without tokens, such as white space among words, is replaced by the
            end-of-text token if the tokenizer has one.
        max_new_tokens: the most tokens to add to each.
        settings: sampling settings.
        stop: strings before which a continuation ends.
        generator: source of random numbers, on the model's device; a seeded one makes the result repeatable.
        draft: a smaller model of the same tokenizer that proposes tokens; texts then advance unevenly.
        compiled: compile each step with `torch.compile`, which takes a minute for each new shape.

    Yields:
        The index of a text and a piece of its continuation, which neither splits a character nor is part of a stop
        string.

    Raises:
        ValueError: a setting out of range, or a prompt that has no tokens.
    """
    end = tokenizer.end_of_text
    prompts = _encode(tokenizer, [text.prompt for text in texts])
    streams = [TextStream(tokenizer, stop, after=ids[-1]) for ids in prompts]
    options = {"generator": generator, "compiled": compiled, "is_finished": lambda row, token: texts[row].finished}
    request = _request(model, prompts, max_new_tokens, settings, **options)
    for step in generate.decode(model, request, draft):
        for row, token, log_prob in zip(*step, strict=True):
            text = texts[row]
            text.tokens.append(token)
            text.log_probs.append(log_prob)
            # the end-of-text token has no text
            piece = streams[row].flush() if token == end else streams[row].push(token)
            text.finished = token == end or streams[row].finished
            if piece:
                text.text += piece
                yield row, piece
    for row, text in enumerate(texts):
        if piece := streams[row].flush():
            text.text += piece
            yield row, piece


def search(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    beams: BeamSearch,
    settings: Sampling | None = None,
) -> list[Text]:
    """Find the likeliest continuations of texts, up to the end-of-text token.

    Arguments are those of `stream`, and the settings of the search; `settings` may have penalties and n-gram blocking.

    Returns:
        For each prompt its `beams.num_return_sequences` texts with their scores, best first.

    Raises:
        ValueError: as `stream`, and for sampling settings that a search excludes.
    """
    end = tokenizer.end_of_text
    ids = _encode(tokenizer, prompts)
    request = _request(model, ids, max_new_tokens, settings)
    found = generate.search_beams(model, request, beams, [] if end is None else [end])
    texts: list[Text] = []
    for prompt, before, hypotheses in zip(prompts, ids, found, strict=True):
        for hypothesis in hypotheses:
            stream = TextStream(tokenizer, after=before[-1])
            text = "".join([*(stream.push(token) for token in hypothesis.tokens if token != end), stream.flush()])
            score = hypothesis.score if math.isfinite(hypothesis.score) else None
            texts.append(Text(prompt, text, hypothesis.tokens, finished=hypothesis.finished, score=score))
    return texts


def _encode(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Tokens of the prompts, at least one of each."""
    found = [tokenizer.encode(prompt).tolist() for prompt in prompts]
    if tokenizer.end_of_text is not None:
        return [ids or [tokenizer.end_of_text] for ids in found]
    for prompt, ids in zip(prompts, found, strict=True):
        if not ids:
            raise ValueError(f"the prompt {prompt!r} has no tokens; give at least one character")
    return found


def _request(
    model: CausalLM, prompts: list[list[int]], max_new_tokens: int, settings: Sampling | None, **options: Any
) -> GenerationRequest:
    """A request for tokenised prompts, padded on the model's device."""
    lengths = [len(ids) for ids in prompts]
    longest = max(lengths, default=1)
    padded = [ids + [0] * (longest - len(ids)) for ids in prompts]
    idx = torch.tensor(padded, device=device_of(model)).view(len(prompts), longest)
    return GenerationRequest(idx, lengths, max_new_tokens, settings or Sampling(), **options)
