"""Autoregressive decoding: one sampled token for each sequence and step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from gptfast.generation.decoder import CachedDecoder, CausalLM, GenerationRequest, evaluating
from gptfast.generation.sampling import (
    Sampling,
    exponential_noise,
    process_logits,
    require_finite,
    sample,
    token_log_probs,
)


class Step(NamedTuple):
    """One more token of each sequence that is not finished."""

    rows: list[int]  # of the request's batch
    tokens: list[int]
    log_probs: list[float]  # empty unless requested


class SampledTokens(NamedTuple):
    """Tokens of a step, and all that the host reads of it."""

    tokens: Tensor  # [B] int64
    summary: Tensor  # [3, B] float32 for one copy: tokens (exact to 2**24), log-probabilities, largest logits


@dataclass(frozen=True)
class Sampler:
    """A decoder's head that draws a token for each sequence.

    Args:
        sampling: settings of the draw.
        generator: source of random numbers; PyTorch's default generator if None.
        log_probs: compute log-probabilities; they are 0 otherwise.
    """

    sampling: Sampling
    generator: torch.Generator | None
    log_probs: bool

    def noise(self, shape: Sequence[int], device: torch.device) -> Tensor | None:
        """Exponential noise [B, V]; None for greedy decoding."""
        if self.sampling.temperature == 0.0:
            return None
        return exponential_noise(torch.empty(*shape, device=device), self.generator)

    def __call__(self, logits: Tensor, noise: Tensor | None, decoder: CachedDecoder) -> SampledTokens:
        """Draw a token for each row of the logits [B, V]."""
        processed = process_logits(
            logits.float(), decoder.tokens, decoder.lengths, decoder.prompt_lengths, self.sampling
        )
        tokens = sample(processed, noise, self.sampling)  # [B]
        largest = logits.amax(-1).float()  # [B], for `require_finite`
        log_probs = token_log_probs(logits, tokens) if self.log_probs else torch.zeros_like(largest)
        return SampledTokens(tokens, torch.stack((tokens.float(), log_probs, largest)))


class HostCopy:
    """Asynchronous device-to-host copy of a tensor."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._copied: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(values.device))

    def wait(self) -> Tensor:
        """Return the copy on the host, once it has arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values


@torch.no_grad()
def decode_n_tokens(model: CausalLM, request: GenerationRequest) -> Iterator[Step]:
    """Yield the tokens of the continuations, step by step. Finished sequences leave the batch.

    Raises:
        ValueError: token ids out of range, or logits that are not finite.
    """
    model.require_tokens(request.idx)
    if request.max_new_tokens == 0 or len(request.idx) == 0:
        return
    rows = list(range(len(request.idx)))  # the decoder's sequences
    live = rows  # indices into `rows` of sequences that are not finished
    with evaluating(model):
        head = Sampler(request.sampling, request.generator, request.log_probs)
        decoder = CachedDecoder(model, request, head)
        sampled = decoder.prefill()
        for number in range(request.max_new_tokens):
            is_last = number == request.max_new_tokens - 1
            copy, following = HostCopy(sampled.summary), sampled
            if request.runs_ahead and not is_last:
                following = decoder.decode_one_token(sampled.tokens)
            tokens, log_probs, largest = ([values[i] for i in live] for values in copy.wait().tolist())
            require_finite(largest)
            step = Step([rows[i] for i in live], [int(token) for token in tokens], log_probs if head.log_probs else [])
            yield step
            is_live = [not request.is_finished(row, token) for row, token in zip(step.rows, step.tokens, strict=True)]
            live = list(compress(live, is_live))
            if is_last or not live:
                return
            if len(live) < len(rows) and decoder.should_compact(len(live)):
                kept = torch.tensor(live, device=request.idx.device)
                decoder.reorder(kept)
                following = SampledTokens(following.tokens[kept], following.summary[:, kept])
                rows, live = [rows[i] for i in live], list(range(len(live)))
            sampled = following if request.runs_ahead else decoder.decode_one_token(following.tokens)
