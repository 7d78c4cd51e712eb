"""Sequences of any length, decoded together with keys and values kept, go on as each does alone without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gptfast.generation.decoder
from gptfast import GPT, GPTConfig
from gptfast.generation.decoder import CachedDecoder, Logits
from tests.support.graphs import stand_in
from tests.support.oracle import DEVICE

MODELS = {
    "pre-norm": {},
    "post-norm": {"norm_position": "post", "activation": "relu"},
    "sinusoidal": {"position": "sinusoidal", "bias": False},
    "no positions": {"position": "none"},
    "padded": {"pad_vocab_size_to": 32},
}


def build(backend: str = "eager", **changes) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(block_size=12, vocab_size=23, n_layer=2, n_head=2, n_embd=32, init_std=0.3, **changes)
    return GPT(config, backend=backend).to(DEVICE).eval()


def prompts(lengths: list[int]) -> Tensor:
    idx = torch.randint(23, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    for row, length in enumerate(lengths):
        idx[row, length:] = 7  # nobody is to look at it
    return idx.to(DEVICE)


def alone(model: GPT, tokens: Tensor) -> Tensor:
    """The logits [V] after tokens [T], without a cache."""
    return model(tokens[None, -model.config.block_size :])[0][0, -1]


def assert_as_alone(model: GPT, logits: Tensor, sequences: list[Tensor]) -> None:
    assert logits.shape == (len(sequences), 23)
    for row, sequence in zip(logits, sequences, strict=True):
        torch.testing.assert_close(row, alone(model, sequence), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [1, 5, 3], [9, 2], [15, 3], [20, 14]], ids=str)
@pytest.mark.parametrize(
    ("backend", "changes", "chunk"),
    [("triton", {}, 512), *(("eager", changes, chunk) for changes in MODELS.values() for chunk in (512, 3))],
    ids=["triton", *(f"{name}-{chunk}" for name in MODELS for chunk in (512, 3))],
)
def test_every_step_is_that_of_each_sequence_alone(monkeypatch, backend, changes, chunk, lengths):
    """Until the window is full, and when it has moved on."""
    monkeypatch.setattr(gptfast.generation.decoder, "CHUNK", chunk)
    model, idx = build(backend, **changes), prompts(lengths)
    reference = build("eager", **changes)
    decoder = CachedDecoder(model, idx, lengths, 6, Logits())
    sequences = [row[:length] for row, length in zip(idx, lengths, strict=True)]
    logits = decoder.prefill()
    assert_as_alone(reference, logits, sequences)
    for _ in range(6):
        tokens = logits.argmax(-1)
        sequences = [torch.cat((sequence, token[None])) for sequence, token in zip(sequences, tokens, strict=True)]
        logits = decoder.step(tokens)
        assert_as_alone(reference, logits, sequences)


@torch.no_grad()
@pytest.mark.parametrize("rows", [[0], [2, 0], [1, 1, 0, 2]], ids=str)
@pytest.mark.parametrize("lengths", [[4, 4, 4], [1, 5, 3], [3, 11, 8]], ids=str)
def test_sequences_are_selected_and_repeated(lengths, rows):
    model, idx = build(), prompts(lengths)
    decoder = CachedDecoder(model, idx, lengths, 5, Logits())
    tokens = decoder.prefill().argmax(-1)
    decoder.step(tokens)
    decoder.select(torch.tensor(rows, device=DEVICE))
    sequences = [torch.cat((idx[row, : lengths[row]], tokens[row][None])) for row in rows]
    for token in range(3):
        following = torch.full((len(rows),), token, device=DEVICE)
        sequences = [torch.cat((sequence, following[:1])) for sequence in sequences]
        assert_as_alone(model, decoder.step(following), sequences)


@torch.no_grad()
def test_a_prompt_is_read_once(monkeypatch):
    model = build()
    decoder = CachedDecoder(model, prompts([3, 5]), [3, 5], 6, Logits(), graph=False)  # which would hide calls
    seen = []
    forward = type(model.transformer).forward
    monkeypatch.setattr(
        type(model.transformer), "forward", lambda self, idx, *a: seen.append(idx.shape) or forward(self, idx, *a)
    )
    tokens = decoder.prefill().argmax(-1)
    for _ in range(6):
        tokens = decoder.step(tokens).argmax(-1)
    assert seen == [(2, 5)] + [(2, 1)] * 6


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[3, 3, 3], [1, 5, 3]], ids=str)
def test_steps_are_replayed(monkeypatch, lengths):
    """A graph for each number of sequences; in another order they are still in its memory."""
    captures = stand_in(monkeypatch)
    model, idx = build(), prompts(lengths)
    decoder = CachedDecoder(model, idx, lengths, 12, Logits(), graph=True)
    sequences = [row[:length] for row, length in zip(idx, lengths, strict=True)]
    logits = decoder.prefill()
    for number, rows in enumerate([None, None, None, [2, 0, 0], None, [1, 0], None, None, None]):
        if rows is not None:
            decoder.select(torch.tensor(rows, device=DEVICE))
            sequences, logits = [sequences[row] for row in rows], logits[rows]
        tokens = logits.argmax(-1)
        sequences = [torch.cat((sequence, token[None])) for sequence, token in zip(sequences, tokens, strict=True)]
        logits = decoder.step(tokens).clone()  # a graph writes where it wrote before
        assert_as_alone(model, logits, sequences)
        assert len(captures) == (number >= 2) + (number >= 7)
