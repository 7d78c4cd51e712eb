"""Speculative decoding: a small model drafts tokens, and the large one verifies them all at once.

Leviathan et al. 2023 (arXiv:2211.17192) and Chen et al. 2023 (arXiv:2302.01318). The result follows the large model's
distribution whatever the draft proposes: a poor draft costs time alone. Reading a few tokens takes a large model hardly
longer than reading one, because its weights come from memory once either way.

The sequences' lengths stay on the device, so every round has the same shapes and memory, and a CUDA graph replays it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gptfast.cuda_graphs import CUDAGraphCallable
from gptfast.generation import autoregressive
from gptfast.generation.autoregressive import Step
from gptfast.generation.decoder import CausalLM, GenerationRequest, device_of, evaluating, prefill_chunks
from gptfast.generation.kv_cache import KVCache, reordered
from gptfast.generation.model_cache import for_decoding
from gptfast.generation.sampling import (
    exponential_noise,
    filter_logits,
    process_logits,
    require_finite,
    require_integer,
    sample_from,
    token_log_probs,
)


@dataclass
class Draft:
    """A smaller GPT of the same tokenizer that proposes tokens for a larger one, with counters of its success.

    Its window, depth, width, dtype and backend may differ from the larger model's. Nothing is proposed beyond its
    window, so a window as long as the larger model's serves best.

    Raises:
        ValueError: `tokens` is not an integer, or below 1.
    """

    model: CausalLM
    """On the device of the larger model."""
    tokens: int = 4
    """Tokens proposed at a time."""
    proposed: int = 0
    """Tokens proposed in all uses."""
    accepted: int = 0
    """Proposals that the larger model accepted, including some beyond the end of a sequence."""

    def __post_init__(self) -> None:
        require_integer("tokens", self.tokens, 1)

    @property
    def acceptance_rate(self) -> float:
        """Share of the proposals that were accepted; nan before the first."""
        return self.accepted / self.proposed if self.proposed else math.nan


@torch.no_grad()
def speculative_decode(model: CausalLM, draft: Draft, request: GenerationRequest) -> Iterator[Step]:
    """Yield the tokens of the continuations in uneven steps, distributed as those of `decode_n_tokens`.

    With temperature 0 the tokens are the same, except where rounding decides between logits: a model that reads several
    tokens at once adds in another order.

    Where proposals do not fit into both models' windows, the larger model continues alone, after the other sequences
    are finished.

    Raises:
        ValueError: token ids out of range, a draft of another vocabulary or device, or logits of either model that are
            not finite.
    """
    model.require_tokens(request.idx)
    _require_pair(model, draft.model)
    if request.max_new_tokens == 0:
        return
    sequences = [
        _Sequence(row, request.idx[row, :length], length, length, length + request.max_new_tokens)
        for row, length in enumerate(request.lengths)
    ]
    limit = min(model.config.block_size, draft.model.config.block_size) - draft.tokens
    with evaluating(model), evaluating(draft.model):
        alone = [sequence for sequence in sequences if sequence.length > limit]
        drafted = [sequence for sequence in sequences if sequence.length <= limit]
        if drafted:
            alone += yield from _decode_drafted(model, draft, request, drafted, limit)
        if alone:
            yield from _decode_alone(model, request, alone)


def _require_pair(model: CausalLM, draft: CausalLM) -> None:
    vocab_size, expected = draft.config.vocab_size, model.config.vocab_size
    if vocab_size != expected:
        raise ValueError(
            f"draft.model has a vocabulary of {vocab_size} tokens, the model one of {expected}; "
            "use two models of one tokenizer"
        )
    device, expected_device = device_of(draft), device_of(model)
    if device != expected_device:
        raise ValueError(f"draft.model is on {device}, the model on {expected_device}; move one to the other")


@dataclass
class _Sequence:
    """The host's view of a sequence."""

    row: int  # in the request's batch
    tokens: Tensor  # [T] int64 on the device; stale during drafted rounds, whose decoder has its own
    prompt_length: int
    length: int
    max_length: int

    @property
    def missing(self) -> int:
        """Tokens up to `max_length`."""
        return self.max_length - self.length

    def append(self, token: int, is_finished: Callable[[int, int], bool]) -> bool:
        """Count a token that was yielded; True if the sequence continues."""
        self.length += 1
        return not is_finished(self.row, token) and self.missing > 0


def _padded(sequences: list[_Sequence]) -> tuple[Tensor, list[int]]:
    """Tokens [B, T] of sequences, and their lengths."""
    tokens = [sequence.tokens[: sequence.length] for sequence in sequences]
    return torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True), [sequence.length for sequence in sequences]


def _decode_drafted(
    model: CausalLM, draft: Draft, request: GenerationRequest, sequences: list[_Sequence], limit: int
) -> Generator[Step, None, list[_Sequence]]:
    """Yield the tokens of sequences until they are finished or longer than `limit`; return the latter."""
    idx, lengths = _padded(sequences)
    decoder = SpeculativeDecoder(model, draft, replace(request, idx=idx, lengths=lengths))
    live = dict(enumerate(sequences))  # by row of the decoder
    outgrown: list[_Sequence] = []
    while live:
        result = decoder.decode_round(max(sequence.missing for sequence in live.values()))
        _update_counters(draft, result, live)
        for number in range(len(result.tokens[0])):
            rows = [row for row in live if result.accepted[row] >= number]
            if not rows:
                break
            require_finite([result.largest[row][number] for row in rows])
            tokens = [result.tokens[row][number] for row in rows]
            log_probs = [result.log_probs[row][number] for row in rows] if request.log_probs else []
            yield Step([live[row].row for row in rows], tokens, log_probs)
            for row, token in zip(rows, tokens, strict=True):
                if not live[row].append(token, request.is_finished):
                    del live[row]
        for row in [row for row, sequence in live.items() if sequence.length > limit]:
            outgrown.append(replace(live.pop(row), tokens=decoder.tokens[row].clone()))
        if live:
            live = dict(zip(decoder.compact(list(live)), live.values(), strict=True))
    return outgrown


def _update_counters(draft: Draft, result: RoundResult, live: dict[int, _Sequence]) -> None:
    """Add a round's proposals to the draft's counters, without those beyond `max_new_tokens`."""
    try:
        for largest in zip(*(result.draft_largest[row] for row in live), strict=True):
            require_finite(largest)
    except ValueError as error:
        raise ValueError(f"draft.model: {error}") from None
    for row, sequence in live.items():
        useful = min(len(result.draft_largest[row]), sequence.missing - 1)
        draft.proposed += useful
        draft.accepted += min(result.accepted[row], useful)


def _decode_alone(model: CausalLM, request: GenerationRequest, sequences: list[_Sequence]) -> Iterator[Step]:
    """Yield the missing tokens of sequences without a draft."""
    idx, lengths = _padded(sequences)
    continued = replace(
        request,
        idx=idx,
        lengths=lengths,
        prompt_lengths=[sequence.prompt_length for sequence in sequences],
        max_new_tokens=max(sequence.missing for sequence in sequences),
        is_finished=lambda row, token: not sequences[row].append(token, request.is_finished),
    )
    for step in autoregressive.decode_n_tokens(model, continued):
        yield step._replace(rows=[sequences[row].row for row in step.rows])


class RoundResult(NamedTuple):
    """A round with K proposals for each of B sequences, on the host."""

    accepted: list[int]  # [B], 0 to K proposals of each
    tokens: list[list[int]]  # [B][K + 1]; the first `accepted` + 1 are valid
    log_probs: list[list[float]]  # [B][K + 1] under the model; 0 unless requested
    largest: list[list[float]]  # [B][K + 1] logits of the model, for `require_finite`
    draft_largest: list[list[float]]  # [B][K] logits of the draft


class _CachedModel:
    """A model with a KV cache that rewinds, prefilled with prompts [B, T] int64."""

    def __init__(self, model: CausalLM, prompts: Tensor, capacity: int, new_tokens: int) -> None:
        self._model = for_decoding(model, new_tokens)
        self.logits = self._model.logits
        self._cache = KVCache(model.config.n_layer, min(model.config.block_size, capacity))
        for _ in prefill_chunks(self._model, prompts, self._cache):
            pass
        self._cache.set_lengths(torch.zeros(len(prompts), dtype=torch.int64, device=prompts.device))
        self.reorder = self._cache.reorder

    def read(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Hidden states [B, R, C] of tokens [B, R] that follow the first `lengths` [B] tokens of the cache."""
        self._cache.rewind(lengths)
        return self._model.transformer(tokens, self._cache)


class SpeculativeDecoder:
    """Batched speculative decoding state.

    Args:
        model: the larger model, in evaluation mode; called without gradients.
        draft: the smaller model and the number K of its proposals per round.
        request: the prompts and all options but `compiled` and `is_finished` are read.

    Attributes:
        tokens: [B, *] int64, each sequence so far, with rejected proposals or padding behind it.
    """

    def __init__(self, model: CausalLM, draft: Draft, request: GenerationRequest) -> None:
        idx, longest, new = request.idx, max(request.lengths), request.max_new_tokens
        self._draft_tokens, self._sampling, self._generator = draft.tokens, request.sampling, request.generator
        self._log_probs, self._greedy = request.log_probs, request.sampling.temperature == 0.0
        self.tokens = torch.nn.functional.pad(idx[:, :longest], (0, new + draft.tokens))
        self._lengths = torch.tensor(request.lengths, device=idx.device)
        self._prompt_lengths = self._lengths.clone()
        self._live = len(idx)
        self._idle: Tensor | None = None  # rows of finished sequences that stay in the batch
        # the first round reads the last token of each prompt
        arguments = (idx[:, : longest - 1], self.tokens.shape[1], len(idx) * new)
        self._target, self._proposer = _CachedModel(model, *arguments), _CachedModel(draft.model, *arguments)
        graph = request.uses_cuda_graph
        self._replayed = CUDAGraphCallable(partial(self._round, count=draft.tokens), self._generator) if graph else None
        # the draft lacks the last two tokens of a sequence whose proposals were all accepted: it then reads both
        self._draft_lags = graph

    def decode_round(self, wanted: int) -> RoundResult:
        """Propose and verify. The only synchronisation with the host is one copy at the end.

        Args:
            wanted: the most tokens that a sequence is to grow by, at least 1. Sequences that are not idle must be
                at least K tokens shorter than both models' windows.
        """
        if self._idle is not None:
            self._lengths.index_fill_(0, self._idle, 1)
        if self._replayed is None:
            count = min(self._draft_tokens, wanted - 1)
            packed, self._lengths = self._round(self._lengths, count)
        else:  # a graph has one shape
            count = self._draft_tokens
            packed, self._lengths = self._replayed(self._lengths)
        packed = packed.cpu()
        accepted = packed[:, 0].tolist()
        tokens = packed[:, 1 : count + 2].tolist()
        self._draft_lags = self._replayed is not None or count in accepted
        floats = packed[:, count + 2 :].view(torch.float32).split((count + 1, count + 1, count), dim=1)
        return RoundResult(accepted, tokens, *(part.tolist() for part in floats))

    def compact(self, rows: Sequence[int]) -> list[int]:
        """Continue with the sequences in `rows` alone, and return their new rows.

        Capturing a graph takes as long as many rounds. With a graph, finished sequences therefore stay in the batch as
        idle sequences of one token while more than half of the sequences are left.
        """
        batch = len(self.tokens)
        if len(rows) == self._live:
            return list(rows)
        self._live = len(rows)
        if self._replayed is not None and 2 * len(rows) > batch:
            self._idle = torch.tensor(sorted(set(range(batch)) - set(rows)), device=self.tokens.device)
            return list(rows)
        kept = torch.tensor(rows, device=self.tokens.device)
        self.tokens, self._lengths, self._prompt_lengths = (
            reordered(whole, kept) for whole in (self.tokens, self._lengths, self._prompt_lengths)
        )
        self._target.reorder(kept)
        self._proposer.reorder(kept)
        self._idle = None
        if self._replayed is not None:
            self._replayed.reset()
        return list(range(len(rows)))

    def _round(self, lengths: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Append the accepted proposals and the token after them to sequences of `lengths` [B] tokens.

        Returns:
            [B, 1 + 3 * (K + 1) + K] int32, a `RoundResult` for one copy, with floats as their bits; the new lengths.
        """
        # [B, K + 2], from the last token on
        positions = lengths[:, None] + torch.arange(-1, count + 1, device=lengths.device)
        new = positions[:, 1:]  # [B, K + 1], positions that are written
        draft_probs, draft_largest = self._propose(positions[:, :-1])
        logits = self._target.logits(self._target.read(self.tokens.gather(1, positions[:, :-1]), positions[:, 0]))
        accepted = self._verify(self._processed(logits, new), new, draft_probs)
        tokens = self.tokens.gather(1, new)  # [B, K + 1]
        largest = logits.amax(-1).float()
        log_probs = torch.zeros_like(largest)
        if self._log_probs:
            log_probs = token_log_probs(logits.flatten(0, 1), tokens.flatten()).view_as(tokens)
        bits = [value.view(torch.int32) for value in (log_probs, largest, *draft_largest)]
        return torch.cat((accepted[:, None].int(), tokens.int(), *bits), dim=1), lengths + accepted + 1

    def _propose(self, positions: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Draft K tokens one after another, from the last token's position on.

        Args:
            positions: [B, K + 1] of the last token and the proposals.

        Returns:
            For each proposal the distribution it was drawn from, [B, 1, V], none with temperature 0; for each the
            draft's largest logit, [B, 1].
        """
        draft_probs, largest = [], []
        token = self.tokens.gather(1, positions[:, :1])  # [B, 1]
        last, *following = positions.split(1, dim=1)  # [B, 1] each
        for number, position in enumerate(following):
            if number == 0 and self._draft_lags:
                first = (last - 1).clamp(min=0)
                both = self.tokens.gather(1, first + torch.arange(2, device=first.device))  # [B, 2]
                x = self._proposer.read(both, first[:, 0])  # [B, 2, C]
                x = x.gather(1, (last - first)[..., None].expand(-1, -1, x.shape[2]))  # [B, 1, C]
            else:
                x = self._proposer.read(token, positions[:, number])  # [B, 1, C]
            logits = self._proposer.logits(x)  # [B, 1, V]
            largest.append(logits.amax(-1).float())
            processed = self._processed(logits, position)
            if self._greedy:
                token = processed.argmax(-1)  # [B, 1]
            else:
                draft_probs.append(self._probabilities(processed))
                token = sample_from(draft_probs[-1], exponential_noise(processed[:, 0], self._generator)[:, None])
            self.tokens.scatter_(1, position, token)
        return draft_probs, largest

    def _verify(self, logits: Tensor, new: Tensor, draft_probs: list[Tensor]) -> Tensor:
        """Count the accepted proposals, [B], by processed logits [B, K + 1, V], and write the token after them."""
        proposals = self.tokens.gather(1, new[:, :-1])  # [B, K]
        if self._greedy:
            likeliest = logits.argmax(-1)  # [B, K + 1]
            self.tokens.scatter_(1, new, likeliest)  # accepted proposals are the same
            return count_leading(proposals == likeliest[:, :-1])
        p = self._probabilities(logits)
        q = torch.cat((*draft_probs, torch.zeros_like(p[:, :1])), dim=1)  # [B, K + 1, V]
        uniforms = torch.rand(proposals.shape, generator=self._generator, device=p.device)
        accepted, token = rejection_sample(p, q, proposals, uniforms, exponential_noise(p[:, 0], self._generator))
        self.tokens.scatter_(1, new[:, :1] + accepted[:, None], token[:, None])
        return accepted

    def _processed(self, logits: Tensor, lengths: Tensor) -> Tensor:
        """Apply penalties and n-gram blocking to logits [B, R, V] after `lengths` [B, R] tokens; float32."""
        if not self._sampling.needs_history:
            return logits.float()
        repeats = lengths.shape[1]
        tokens = self.tokens[:, None].expand(-1, repeats, -1).flatten(0, 1)  # [B * R, *]
        prompt_lengths = self._prompt_lengths[:, None].expand(-1, repeats).flatten()  # [B * R]
        flat = logits.float().flatten(0, 1)
        return process_logits(flat, tokens, lengths.flatten(), prompt_lengths, self._sampling).view_as(logits)

    def _probabilities(self, logits: Tensor) -> Tensor:
        return filter_logits(logits.flatten(0, 1), self._sampling).softmax(-1).view_as(logits)


def rejection_sample(p: Tensor, q: Tensor, proposals: Tensor, uniforms: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Rejection sampling of draft tokens (Leviathan et al. 2023, appendix A.1).

    A proposal x ~ q is accepted with probability min(1, p(x) / q(x)). The first rejected one is replaced by a draw from
    max(0, p - q), normalised, so each token is distributed as p. A draw from p follows if all are accepted.

    Args:
        p: [B, K + 1, V] float32, the model's probabilities at each proposal and after the last.
        q: [B, K + 1, V] float32, the draft's; 0 after the last proposal.
        proposals: [B, K] int64, K >= 0.
        uniforms: [B, K] float32 in [0, 1), independent.
        noise: [B, V] float32 from `exponential_noise`.

    Returns:
        [B] int64, accepted proposals, 0 to K; [B] int64, the token after them.
    """
    chosen = proposals[..., None]  # [B, K, 1]
    # a product, and strictly less: probability 0 is never accepted, p = q always
    accepted = count_leading(uniforms * q[:, :-1].gather(2, chosen)[..., 0] < p[:, :-1].gather(2, chosen)[..., 0])
    position = accepted[:, None, None].expand(-1, 1, p.shape[2])  # [B, 1, V]
    p, q = p.gather(1, position)[:, 0], q.gather(1, position)[:, 0]  # [B, V] each
    residual = (p - q).clamp(min=0.0)
    # rounding may leave nothing of nearly equal distributions
    residual = torch.where(residual.sum(-1, keepdim=True) > 0.0, residual, p)
    return accepted, sample_from(residual, noise)


def count_leading(flags: Tensor) -> Tensor:
    """Count the true flags of each row [B, K] before the first false one, [B] int64."""
    return flags.long().cumprod(1).sum(1)
