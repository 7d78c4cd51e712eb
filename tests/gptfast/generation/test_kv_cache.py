"""A model with a KV cache gives the logits it gives without."""

from __future__ import annotations

import pytest
import torch

from gptfast.generation.kv_cache import KVCache
from tests.support.generation import VARIANTS, gpt, prompts
from tests.support.oracle import DEVICE

MODEL = {"block_size": 12, "n_layer": 3}
BACKENDS = pytest.mark.parametrize("backend", ["eager", "triton"])
MODELS = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(12,), (5, 7), (1,) * 12, (3, 1, 1, 4, 3)], ids=str)
@MODELS
@BACKENDS
def test_pieces_through_a_cache_give_the_logits_of_the_whole(backend, changes, pieces):
    model, idx = gpt(backend=backend, **MODEL, **changes), prompts(12, 12)
    cache, start = KVCache(3, 12), 0
    for piece in pieces:
        end = start + piece
        logits, _ = model(idx[:, start:end], cache=cache)
        torch.testing.assert_close(logits, model(idx[:, :end])[0], rtol=1e-4, atol=1e-4)
        start = end
        assert cache.length == end


@torch.no_grad()
@BACKENDS
def test_single_tokens_take_the_decode_operator(backend, monkeypatch):
    model, called = gpt(backend=backend, **MODEL), []
    for name in ("causal_attention", "causal_attention_qkvpacked", "decode_attention"):
        operator = getattr(model.backend, name)
        monkeypatch.setattr(
            model.backend, name, lambda *a, name=name, operator=operator, **k: called.append(name) or operator(*a, **k)
        )
    cache = KVCache(3, 12)
    for length in (5, 1, 2):
        model(prompts(length, length), cache=cache)
    model(prompts(12, 12))
    expected = ["causal_attention", "decode_attention", "causal_attention", "causal_attention_qkvpacked"]
    assert called == [name for name in expected for _ in range(3)]


def test_dropout_applies_with_a_cache_in_training():
    model = gpt(dropout=0.5, **MODEL).train()
    cache = KVCache(3, 12)
    model(prompts(5, 5), cache=cache)
    torch.manual_seed(1)
    first, _ = model(prompts(1, 1), cache=cache)
    cache.length = 5
    torch.manual_seed(2)
    second, _ = model(prompts(1, 1), cache=cache)
    assert not torch.equal(first, second)


@torch.no_grad()
def test_tokens_beyond_the_capacity_are_refused():
    model, cache = gpt(**MODEL), KVCache(3, 6)
    model(prompts(5, 5), cache=cache)
    with pytest.raises(ValueError, match=r"capacity of 6.*got 7"):
        model(prompts(2, 2), cache=cache)
    assert cache.length == 5
    with pytest.raises(ValueError, match="block_size=12"):
        model(prompts(8, 8), cache=cache)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@MODELS
@BACKENDS
def test_sequences_of_different_lengths_are_as_each_alone(backend, changes, batch):
    """Rewound tokens leave no trace."""
    model, idx = gpt(backend=backend, **MODEL, **changes), prompts(*[9] * batch)
    lengths = torch.tensor([3, 6, 1][:batch], device=DEVICE)
    cache = KVCache(3, 12)
    model.transformer(idx, cache)
    cache.set_lengths(torch.full_like(lengths, 9))
    memory = cache.lengths
    for count in (3, 1, 2):
        cache.rewind(lengths)
        following = prompts(*[12] * 5)[-batch:, :count]
        logits = model.logits(model.transformer(following, cache))  # [B, count, V]
        for row, length in enumerate(lengths.tolist()):
            whole = torch.cat((idx[row, :length], following[row]))[None]
            expected = model.logits(model.transformer(whole))[0, -count:]
            torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
        assert cache.lengths is memory
        assert torch.equal(memory, lengths + count)


def test_rewind_before_set_lengths_is_refused():
    with pytest.raises(ValueError, match="rewind"):
        KVCache(1, 12).rewind(torch.tensor([1]))
