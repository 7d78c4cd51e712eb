"""With keys and values kept, a model says what it says without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptfast import GPT, GPTConfig
from gptfast.generation.cache import KVCache
from oracle import DEVICE

MODELS = {
    "pre-norm": {},
    "post-norm": {"norm_position": "post", "activation": "relu"},
    "sinusoidal": {"position": "sinusoidal", "bias": False},
    "no positions": {"position": "none"},
}


def build(backend: str, **changes) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(block_size=12, vocab_size=23, n_layer=3, n_head=2, n_embd=32, init_std=0.3, **changes)
    return GPT(config, backend=backend).to(DEVICE).eval()


def tokens(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(23, (batch, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(12,), (5, 7), (1,) * 12, (3, 1, 1, 4, 3)], ids=str)
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_pieces_through_a_cache_give_the_logits_of_the_whole(backend: str, changes: dict, pieces: tuple[int, ...]):
    model, idx = build(backend, **changes), tokens()
    cache, start = KVCache(3, 12), 0
    for piece in pieces:
        end = start + piece
        logits, _ = model(idx[:, start:end], cache=cache)
        torch.testing.assert_close(logits, model(idx[:, :end])[0], rtol=1e-4, atol=1e-4)
        start = end
        assert cache.length == end


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_one_token_is_decoded_and_more_are_attended_to(backend: str, monkeypatch):
    model, called = build(backend), []
    for name in ("causal_attention", "causal_attention_qkvpacked", "decode_attention"):
        operator = getattr(model.backend, name)
        monkeypatch.setattr(
            model.backend, name, lambda *a, name=name, operator=operator, **k: called.append(name) or operator(*a, **k)
        )
    cache = KVCache(3, 12)
    for piece in (tokens(2, 5), tokens(2, 1), tokens(2, 2)):
        model(piece, cache=cache)
    model(tokens())
    expected = ["causal_attention", "decode_attention", "causal_attention", "causal_attention_qkvpacked"]
    assert called == [name for name in expected for _ in range(3)]


def test_dropout_in_a_cache_is_that_of_training():
    model = build("eager", dropout=0.5).train()
    cache = KVCache(3, 12)
    model(tokens(2, 5), cache=cache)
    torch.manual_seed(1)
    first, _ = model(tokens(2, 1), cache=cache)
    cache.length = 5
    torch.manual_seed(2)
    second, _ = model(tokens(2, 1), cache=cache)
    assert not torch.equal(first, second)


def test_what_does_not_fit_is_refused():
    model, cache = build("eager"), KVCache(3, 6)
    with torch.no_grad():
        model(tokens(2, 5), cache=cache)
        with pytest.raises(ValueError, match="7 tokens do not fit into a cache for 6"):
            model(tokens(2, 2), cache=cache)
        assert cache.length == 5
        with pytest.raises(ValueError, match="a sequence of 13 tokens is longer than block_size=12"):
            model(tokens(2, 8), cache=cache)


@torch.no_grad()
def test_a_cleared_cache_forgets():
    model, cache = build("eager"), KVCache(3, 12)
    model(tokens(2, 5), cache=cache)
    cache.clear()
    other = tokens(2, 12)[:, 5:]
    torch.testing.assert_close(model(other, cache=cache)[0], model(other)[0])


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_what_was_shortened_is_as_if_it_had_never_been(backend):
    model, idx = build(backend), tokens(length=9)
    cache = KVCache(3, 12)
    with torch.no_grad():
        model(idx[:, :8], cache=cache)
        cache.shorten(5)
        logits = model(idx[:, 6:9], cache=cache)[0]
        others = torch.cat((idx[:, :5], idx[:, 6:9]), dim=1)
        torch.testing.assert_close(logits, model(others)[0], atol=1e-5, rtol=1e-4)


def test_a_cache_is_not_shortened_to_what_it_has_not():
    cache = KVCache(1, 12)
    with pytest.raises(ValueError, match="length must be from 0 to 0, got 1"):
        cache.shorten(1)
    cache.part(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="sequences of different lengths cannot be shortened"):
        cache.shorten(0)
