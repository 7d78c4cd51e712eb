"""With keys and values kept, a model says what it says without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptfast import GPT, GPTConfig
from gptfast.generation.kv_cache import KVCache
from tests.support.oracle import DEVICE

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
        with pytest.raises(ValueError, match="13 tokens are longer than block_size=12"):
            model(tokens(2, 8), cache=cache)


@torch.no_grad()
def test_a_cleared_cache_forgets():
    model, cache = build("eager"), KVCache(3, 12)
    model(tokens(2, 5), cache=cache)
    cache.clear()
    other = tokens(2, 12)[:, 5:]
    torch.testing.assert_close(model(other, cache=cache)[0], model(other)[0])


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_several_tokens_of_sequences_of_different_lengths(backend, changes, batch):
    """Each as if it were alone, in places of its own; what was rewound is as if it had never been."""
    model, idx = build(backend, **changes), tokens(batch, 9)
    lengths = torch.tensor([3, 6, 1][:batch], device=DEVICE)
    cache = KVCache(3, 12)
    model.transformer(idx, cache)
    cache.part(torch.full_like(lengths, 9))
    memory = cache.lengths
    for count in (3, 1, 2):
        cache.rewind(lengths)
        following = tokens(5, 12)[-batch:, :count]
        logits = model.logits(model.transformer(following, cache))  # [B, count, V]
        for row, length in enumerate(lengths.tolist()):
            whole = torch.cat((idx[row, :length], following[row]))[None]
            expected = model.logits(model.transformer(whole))[0, -count:]
            torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
        assert cache.lengths is memory
        assert torch.equal(memory, lengths + count)


def test_sequences_are_not_rewound_before_they_part():
    with pytest.raises(ValueError, match="sequences are rewound once they have parted"):
        KVCache(1, 12).rewind(torch.tensor([1]))
