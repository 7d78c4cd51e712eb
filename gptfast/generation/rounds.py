"""Rounds of speculative decoding on the device: a draft proposes, the model reads all proposals, some of them stand.

How long each sequence is stays on the device, so that every round has the same shapes and finds everything where it was
before: a CUDA graph replays it. Launched one by one, the kernels of a small draft would take the host longer than all
that the round saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gptfast.cuda_graphs import CUDAGraphCallable
from gptfast.generation import decoder, sampling
from gptfast.generation.autoregressive import log_softmax_of
from gptfast.generation.decoder import CausalLM
from gptfast.generation.kv_cache import KVCache, selected
from gptfast.generation.sampling import Sampling
from gptfast.generation.verification import leading, race, verify
from gptfast.quantization import for_decoding


class Told(NamedTuple):
    """What the host is told of a round with K proposals for each of B sequences."""

    accepted: list[int]  # B, of each 0 to K
    tokens: list[list[int]]  # [B][K + 1], of which the first `accepted` + 1 count
    log_probs: list[list[float]]  # [B][K + 1], by the model; 0 unless they were asked for
    largest: list[list[float]]  # [B][K + 1] logits, from which it is seen whether there is a distribution at all
    draft_largest: list[list[float]]  # [B][K]


class _Round(NamedTuple):
    told: Tensor  # [B, 1 + 3 * (K + 1) + K] int32, `Told` for one copy: floats as their bits
    ends: Tensor  # [B] int64, how many tokens each sequence has now


class _Reader:
    """A model with the keys and values of the tokens that it has read.

    Args:
        model: in evaluation mode.
        prompts: [B, T] int64, what of the prompts is read at once.
        capacity: the most tokens that a sequence will have.
        new_tokens: how many the batch will have.
    """

    def __init__(self, model: CausalLM, prompts: Tensor, capacity: int, new_tokens: int) -> None:
        self._model = for_decoding(model, new_tokens)
        self.logits = self._model.logits
        self._cache = KVCache(model.config.n_layer, min(model.config.block_size, capacity))
        for first in range(0, prompts.shape[1], decoder.CHUNK):
            self._model.transformer(prompts[:, first : first + decoder.CHUNK], self._cache)
        self._cache.part(torch.zeros(len(prompts), dtype=torch.int64, device=prompts.device))

    def read(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The model's output [B, R, C] at tokens [B, R] that follow the first `lengths` [B] of those it has read."""
        self._cache.rewind(lengths)
        return self._model.transformer(tokens, self._cache)

    def select(self, rows: Tensor) -> None:
        """Go on with some of the sequences."""
        self._cache.select(rows)


class Rounds:
    """Sequences that grow by what a draft proposes and a model lets stand.

    Args:
        model: the larger GPT, in evaluation mode; called without gradients.
        draft: the smaller, of the same tokenizer.
        idx: [B, T] int64 prompts, padded at their ends.
        lengths: how many tokens of each are the prompt's, at least 1.
        count: K, how many tokens the draft proposes in a round.
        max_new_tokens: the most that is wanted of each.
        settings: how tokens are drawn, by both models.
        generator: what they are drawn from; PyTorch's own if None.
        log_probs: whether log-probabilities were asked for.
        graph: replay a round from a CUDA graph, captured once for each number of sequences; by default on GPUs.

    Attributes:
        tokens: [B, *] int64, all of each sequence so far, and behind them whatever was proposed.
    """

    def __init__(
        self,
        model: CausalLM,
        draft: CausalLM,
        idx: Tensor,
        lengths: Sequence[int],
        count: int,
        max_new_tokens: int,
        settings: Sampling,
        generator: torch.Generator | None,
        log_probs: bool,
        graph: bool | None = None,
    ) -> None:
        self._count, self._settings, self._generator, self._log_probs = count, settings, generator, log_probs
        longest = max(lengths)
        self.tokens = torch.nn.functional.pad(idx[:, :longest], (0, max_new_tokens + count))
        self._ends = torch.tensor(lengths, device=idx.device)
        self._prompts = self._ends.clone()
        self._going = len(idx)
        self._idle: Tensor | None = None  # the places of the others
        # the last token of each is read in the first round
        shape = (idx[:, : longest - 1], self.tokens.shape[1], len(idx) * max_new_tokens)
        self._target, self._proposer = (_Reader(each, *shape) for each in (model, draft))
        graph = idx.is_cuda if graph is None else graph
        self._replayed = CUDAGraphCallable(lambda ends: self._round(ends, count), generator) if graph else None
        # whether the draft reads the last two tokens of each again: of one, all of whose proposals stood, it lacks both
        self._behind = graph

    def next(self, wanted: int) -> Told:
        """A round, of which no sequence needs more than `wanted` tokens, at least 1.

        Each sequence has to have `count` tokens less than either model's window, or to be `idle`. All is done on the
        device, but for one copy to the host at the end.
        """
        if self._idle is not None:
            self._ends.index_fill_(0, self._idle, 1)
        if self._replayed is None:
            count = min(self._count, wanted - 1)
            told, self._ends = self._round(self._ends, count)
        else:  # whose shapes are always the same
            count = self._count
            told, self._ends = self._replayed(self._ends)
        told = told.cpu()
        integers = told[:, : count + 2].tolist()
        self._behind = self._replayed is not None or count in (row[0] for row in integers)
        floats = told[:, count + 2 :].view(torch.float32).split((count + 1, count + 1, count), dim=1)
        log_probs, largest, draft_largest = (part.tolist() for part in floats)
        return Told([row[0] for row in integers], [row[1:] for row in integers], log_probs, largest, draft_largest)

    def keep(self, places: Sequence[int]) -> list[int]:
        """Go on with the sequences at some places alone; the places that they have from now on.

        A graph is captured for each number of sequences, which takes as long as many rounds: as long as more than half
        of them remain, the others stay in the batch as sequences of one token, of which nothing is to be read.
        """
        rows = len(self.tokens)
        if len(places) == self._going:
            return list(places)
        self._going = len(places)
        if self._replayed is None or 2 * len(places) <= rows:
            kept = torch.tensor(places, device=self.tokens.device)
            self.tokens, self._ends, self._prompts = (
                selected(whole, kept) for whole in (self.tokens, self._ends, self._prompts)
            )
            self._target.select(kept)
            self._proposer.select(kept)
            self._idle = None
            if self._replayed is not None:
                self._replayed.reset()
            return list(range(len(places)))
        self._idle = torch.tensor(sorted(set(range(rows)) - set(places)), device=self.tokens.device)
        return list(places)

    def _round(self, ends: Tensor, count: int) -> _Round:
        """Add the proposals that stand and the token after them to sequences of `ends` [B] tokens."""
        places = ends[:, None] + torch.arange(-1, count + 1, device=ends.device)  # [B, K + 2], from the last token's on
        before = places[:, 1:]  # [B, K + 1], tokens before each place that is written
        drawn_from, draft_largest = self._propose(places[:, :-1])
        logits = self._target.logits(self._target.read(self.tokens.gather(1, places[:, :-1]), places[:, 0]))
        accepted = self._accept(self._processed(logits, before), before, drawn_from)
        tokens = self.tokens.gather(1, before)  # [B, K + 1]
        largest = logits.amax(-1).float()
        found = torch.zeros_like(largest)
        if self._log_probs:
            found = log_softmax_of(logits.flatten(0, 1), tokens.flatten()).view_as(tokens)
        bits = [value.view(torch.int32) for value in (found, largest, *draft_largest)]
        return _Round(torch.cat((accepted[:, None].int(), tokens.int(), *bits), dim=1), ends + accepted + 1)

    def _propose(self, places: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Write K tokens, one after another, behind those at the `places` [B, K + 1].

        Returns:
            What each was drawn from, [B, 1, V]; with temperature 0 nothing. The largest logits at each place, [B, 1].
        """
        drawn_from, largest = [], []
        token = self.tokens.gather(1, places[:, :1])  # [B, 1]
        last, *following = places.split(1, dim=1)  # [B, 1] each
        for number, place in enumerate(following):
            if number == 0 and self._behind:
                first = (last - 1).clamp(min=0)
                both = self.tokens.gather(1, first + torch.arange(2, device=first.device))  # [B, 2]
                x = self._proposer.read(both, first[:, 0])  # [B, 2, C]
                x = x.gather(1, (last - first)[..., None].expand(-1, -1, x.shape[2]))  # [B, 1, C]
            else:
                x = self._proposer.read(token, places[:, number])  # [B, 1, C]
            logits = self._proposer.logits(x)  # [B, 1, V]
            largest.append(logits.amax(-1).float())
            left = self._processed(logits, place)
            if self._greedy:
                token = left.argmax(-1)  # [B, 1]
            else:
                drawn_from.append(self._probabilities(left))
                token = race(drawn_from[-1], self._times(left[:, 0])[:, None])
            self.tokens.scatter_(1, place, token)
        return drawn_from, largest

    def _accept(self, logits: Tensor, before: Tensor, drawn_from: list[Tensor]) -> Tensor:
        """How many proposals stand by processed logits [B, K + 1, V], [B]; the token that follows them is written."""
        proposals = self.tokens.gather(1, before[:, :-1])  # [B, K]
        if self._greedy:
            likeliest = logits.argmax(-1)  # [B, K + 1]
            self.tokens.scatter_(1, before, likeliest)  # as are those that stand
            return leading(proposals == likeliest[:, :-1])
        p = self._probabilities(logits)
        q = torch.cat((*drawn_from, torch.zeros_like(p[:, :1])), dim=1)  # [B, K + 1, V]
        uniforms = torch.rand(proposals.shape, generator=self._generator, device=p.device)
        accepted, token = verify(p, q, proposals, uniforms, self._times(p[:, 0]))
        self.tokens.scatter_(1, before[:, :1] + accepted[:, None], token[:, None])
        return accepted

    @property
    def _greedy(self) -> bool:
        return self._settings.temperature == 0.0

    def _processed(self, logits: Tensor, before: Tensor) -> Tensor:
        """Logits [B, R, V] at places with `before` [B, R] tokens before them, as these tokens change them; float32."""
        if not self._settings.looks_back:
            return logits.float()
        places = before.shape[1]
        sequences = self.tokens[:, None].expand(-1, places, -1).flatten(0, 1)  # [B * R, *]
        prompts = self._prompts[:, None].expand(-1, places).flatten()  # [B * R]
        left = sampling.process(logits.float().flatten(0, 1), sequences, before.flatten(), prompts, self._settings)
        return left.view_as(logits)

    def _probabilities(self, logits: Tensor) -> Tensor:
        return sampling.filtered(logits.flatten(0, 1), self._settings).softmax(-1).view_as(logits)

    def _times(self, logits: Tensor) -> Tensor:
        return sampling.exponentials(logits, self._generator)
