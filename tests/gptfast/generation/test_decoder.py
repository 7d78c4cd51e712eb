"""Sequences of any lengths, decoded together with a KV cache, get the logits of each alone without one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gptfast.generation.decoder
from gptfast import GPT
from gptfast.generation.decoder import CachedDecoder, RawLogits
from tests.support.generation import VARIANTS, gpt, request
from tests.support.oracle import DEVICE

MODELS = VARIANTS | {"padded": {"pad_vocab_size_to": 32}}


def start(model: GPT, lengths: list[int], new: int, **options) -> tuple[CachedDecoder, list[Tensor]]:
    """A decoder, and its sequences."""
    asked = request(lengths, new, **options)
    return CachedDecoder(model, asked, RawLogits()), [row[:n] for row, n in zip(asked.idx, lengths, strict=True)]


def extended(sequences: list[Tensor], tokens: Tensor) -> list[Tensor]:
    return [torch.cat((sequence, token[None])) for sequence, token in zip(sequences, tokens, strict=True)]


def assert_as_alone(model: GPT, logits: Tensor, sequences: list[Tensor]) -> None:
    assert logits.shape == (len(sequences), 23)
    for row, sequence in zip(logits, sequences, strict=True):
        expected = model(sequence[None, -model.config.block_size :])[0][0, -1]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [1, 5, 3], [9, 2], [15, 3], [20, 14]], ids=str)
@pytest.mark.parametrize(
    ("backend", "changes", "chunk"),
    [("triton", {}, 512), *(("eager", changes, chunk) for changes in MODELS.values() for chunk in (512, 3))],
    ids=["triton", *(f"{name}-{chunk}" for name in MODELS for chunk in (512, 3))],
)
def test_every_step_is_that_of_each_sequence_alone(monkeypatch, backend, changes, chunk, lengths):
    """Within the window and past it."""
    monkeypatch.setattr(gptfast.generation.decoder, "CHUNK", chunk)
    reference = gpt(block_size=12, **changes)
    decoder, sequences = start(gpt(backend=backend, block_size=12, **changes), lengths, 6)
    logits = decoder.prefill()
    assert_as_alone(reference, logits, sequences)
    for _ in range(6):
        tokens = logits.argmax(-1)
        sequences = extended(sequences, tokens)
        logits = decoder.decode_one_token(tokens)
        assert_as_alone(reference, logits, sequences)


@torch.no_grad()
@pytest.mark.parametrize("rows", [[0], [2, 0], [1, 1, 0, 2]], ids=str)
@pytest.mark.parametrize("lengths", [[4, 4, 4], [1, 5, 3], [3, 11, 8]], ids=str)
def test_reorder_selects_and_repeats_sequences(lengths, rows):
    model = gpt(block_size=12)
    decoder, sequences = start(model, lengths, 5)
    tokens = decoder.prefill().argmax(-1)
    decoder.decode_one_token(tokens)
    decoder.reorder(torch.tensor(rows, device=DEVICE))
    sequences = [extended(sequences, tokens)[row] for row in rows]
    for token in range(3):
        following = torch.full((len(rows),), token, device=DEVICE)
        sequences = extended(sequences, following)
        assert_as_alone(model, decoder.decode_one_token(following), sequences)


@torch.no_grad()
def test_a_prompt_is_read_once(reads):
    decoder, _ = start(gpt(block_size=12), [3, 5], 6, cuda_graph=False)
    tokens = decoder.prefill().argmax(-1)
    for _ in range(6):
        tokens = decoder.decode_one_token(tokens).argmax(-1)
    assert [shape for _, shape in reads] == [(2, 5)] + [(2, 1)] * 6


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[3, 3, 3], [1, 5, 3]], ids=str)
def test_steps_are_replayed_from_a_graph_for_each_batch_size(captures, lengths):
    """Reordered sequences stay in the graph's memory."""
    model = gpt(block_size=12)
    decoder, sequences = start(model, lengths, 12, cuda_graph=True)
    logits = decoder.prefill()
    for number, rows in enumerate([None, None, None, [2, 0, 0], None, [1, 0], None, None, None]):
        if rows is not None:
            decoder.reorder(torch.tensor(rows, device=DEVICE))
            sequences, logits = [sequences[row] for row in rows], logits[rows]
        tokens = logits.argmax(-1)
        sequences = extended(sequences, tokens)
        logits = decoder.decode_one_token(tokens).clone()  # the next replay overwrites it
        assert_as_alone(model, logits, sequences)
        assert len(captures) == (number >= 2) + (number >= 7)
