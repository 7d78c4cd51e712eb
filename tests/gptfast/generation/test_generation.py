from __future__ import annotations

import functools
import re

import pytest
import torch

from benchmarks.measuring import model_providers
from gptfast import GPT, GPTConfig
from gptfast.generation import generate
from gptfast.generation.autoregressive import steps
from gptfast.generation.decoder import CachedDecoder
from gptfast.generation.sampling import Sampling
from gptfast.generation.speculative import Draft
from tests.support.oracle import DEVICE

CONFIG = {"block_size": 8, "vocab_size": 23, "n_layer": 2, "n_head": 2, "n_embd": 16, "init_std": 0.3}


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**CONFIG, dropout=0.5)).to(DEVICE)


def prompt(*shape: int) -> torch.Tensor:
    return torch.randint(23, shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def test_greedy_takes_the_likeliest_token_of_the_last_window(model):
    idx = prompt(2, 3)
    written = model.generate(idx, 12, temperature=0.0)
    assert written.shape == (2, 15)
    assert torch.equal(written[:, :3], idx)
    model.eval()
    for end in range(3, 15):
        logits, _ = model(written[:, max(0, end - 8) : end])
        assert torch.equal(written[:, end], logits[:, -1].argmax(-1))


def test_the_likeliest_of_one_is_greedy(model):
    idx = prompt(1, 3)
    assert torch.equal(model.generate(idx, 10, top_k=1), model.generate(idx, 10, temperature=0))


def test_a_generator_makes_sampling_repeatable(model):
    idx = prompt(1, 3)
    first = model.generate(idx, 20, generator=generator())
    assert torch.equal(first, model.generate(idx, 20, generator=generator()))
    assert not torch.equal(first, model.generate(idx, 20, generator=generator(1)))


def test_the_mode_of_the_model_is_left_alone(model):
    for training in (True, False):
        model.train(training)
        model.generate(prompt(1, 3), 1)
        assert model.training is training


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 5e-324])
def test_the_smallest_temperatures_are_greedy(model, temperature):
    idx = prompt(1, 3)
    greedy = model.generate(idx, 10, temperature=0)
    assert torch.equal(model.generate(idx, 10, temperature=temperature), greedy)
    assert torch.equal(model.generate(idx, 10, temperature=temperature, top_k=5), greedy)


def test_top_k_beyond_the_vocabulary_keeps_all(model):
    idx = prompt(1, 3)
    assert torch.equal(
        model.generate(idx, 5, top_k=1000, generator=generator()), model.generate(idx, 5, generator=generator())
    )


def test_nothing_asked_for_is_nothing_added(model):
    assert torch.equal(model.generate(prompt(2, 3), 0), prompt(2, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        ({"temperature": -0.5}, "temperature must be at least 0 and finite, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be at least 0 and finite, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"idx": torch.zeros(1, 0, dtype=torch.long)}, r"idx must be \[B, T\] with T >= 1, got shape \(1, 0\)"),
    ],
)
def test_bad_settings(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{"idx": prompt(1, 3), "max_new_tokens": 1} | arguments)


def ragged(*lengths: int) -> torch.Tensor:
    """Prompts of these lengths, padded with tokens that nobody is to look at."""
    idx = prompt(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        idx[row, length:] = 22
    return idx


@pytest.mark.parametrize("lengths", [(3, 3), (1, 5, 3), (8, 2), (6, 7, 1)], ids=str)
def test_prompts_of_any_lengths_are_continued_as_each_alone(model, lengths):
    """Beyond the window too."""
    idx = ragged(*lengths)
    together = generate.continuations(model, idx, lengths, 9, Sampling(temperature=0))
    for row, length in enumerate(lengths):
        (alone,) = generate.continuations(model, idx[row : row + 1, :length], [length], 9, Sampling(temperature=0))[0]
        assert together[row][0].tokens == alone.tokens
        assert together[row][0].log_probs == pytest.approx(alone.log_probs, abs=1e-4)


def test_log_probabilities_are_the_models_own(model):
    idx = prompt(2, 3)
    chosen = Sampling(temperature=0.5, top_k=3, repetition_penalty=1.3)
    found = generate.continuations(model, idx, [3, 3], 4, chosen, generator=generator())
    model.eval()
    for row, (continuation,) in zip(idx, found, strict=True):
        sequence = row
        for token, log_prob in zip(continuation.tokens, continuation.log_probs, strict=True):
            expected = model(sequence[None])[0][0, -1].log_softmax(-1)[token].item()
            assert log_prob == pytest.approx(expected, abs=1e-4)
            sequence = torch.cat((sequence, torch.tensor([token], device=DEVICE)))


def test_a_stop_token_ends_a_sequence_and_not_the_others(model):
    idx, lengths = ragged(2, 4, 3), [2, 4, 3]
    free = generate.continuations(model, idx, lengths, 8, Sampling(temperature=0))
    stop = free[1][0].tokens[2]
    found = generate.continuations(model, idx, lengths, 8, Sampling(temperature=0), stop_tokens=[stop])
    for (with_stop,), (without,) in zip(found, free, strict=True):
        ends = without.tokens.index(stop) + 1 if stop in without.tokens else 8
        assert with_stop.tokens == without.tokens[:ends]
        assert with_stop.finished is (stop in without.tokens)
    assert len(found[1][0].tokens) <= 3


def test_sequences_that_have_ended_cost_nothing(model, monkeypatch):
    idx = torch.tensor([[1, 2, 3], [9, 8, 7], [15, 4, 20]], device=DEVICE)
    first = [c.tokens[0] for (c,) in generate.continuations(model, idx, [3] * 3, 1, Sampling(temperature=0))]
    assert first[1] != first[0] != first[2]
    sizes = []
    forward = type(model.transformer).forward
    monkeypatch.setattr(
        type(model.transformer), "forward", lambda self, idx, *a: sizes.append(len(idx)) or forward(self, idx, *a)
    )
    # on a GPU steps begin before the last one is read, and graphs are kept while most sequences go on
    monkeypatch.setattr(
        "gptfast.generation.autoregressive.CachedDecoder", functools.partial(CachedDecoder, graph=False)
    )
    for stops, expected in ((first[:1], [3, 2]), (first, [3])):
        sizes.clear()
        ends = lambda row, token, stops=stops: token in stops  # noqa: E731
        list(steps(model, idx, [3] * 3, 3, Sampling(temperature=0), ends, ahead=False))
        assert sizes[:2] == expected


def test_rows_are_filled_up_with_their_stop_token(model):
    idx = prompt(2, 3)
    free = model.generate(idx, 6, temperature=0)
    stop = free[0, 4].item()
    written = model.generate(idx, 6, temperature=0, stop_tokens=[stop])
    ends = free[0, 3:].tolist().index(stop) + 4
    assert written[0, :ends].tolist() == free[0, :ends].tolist()
    assert set(written[0, ends:].tolist()) <= {stop}


def test_several_samples_of_a_prompt(model):
    idx = prompt(2, 3)
    written = model.generate(idx, 10, num_samples=3, generator=generator())
    assert written.shape == (6, 13)
    assert torch.equal(written[:, :3], idx.repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in written[:3].tolist()}) > 1
    found = generate.continuations(model, idx, [3, 3], 10, num_samples=3, generator=generator())
    assert [len(samples) for samples in found] == [3, 3]
    assert [c.tokens for samples in found for c in samples] == written[:, 3:].tolist()


def test_settings_change_what_is_drawn(model):
    idx = prompt(1, 3)
    plain = model.generate(idx, 30, generator=generator())
    for settings in ({"top_p": 0.3}, {"min_p": 0.5}, {"typical_p": 0.2}, {"repetition_penalty": 2.0},
                     {"presence_penalty": 3.0}, {"frequency_penalty": 2.0}, {"no_repeat_ngram_size": 1}):  # fmt: skip
        assert not torch.equal(model.generate(idx, 30, generator=generator(), **settings), plain), settings


def test_no_token_twice(model):
    written = model.generate(prompt(2, 3), 15, no_repeat_ngram_size=1, generator=generator())
    for row, start in zip(written.tolist(), prompt(2, 3).tolist(), strict=True):
        assert len(set(row[3:])) == 15
        assert not set(row[3:]) & set(start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [3]}, "lengths must be 2 numbers from 1 to 3, got [3]"),
        ({"lengths": [3, 4]}, "lengths must be 2 numbers from 1 to 3, got [3, 4]"),
        ({"lengths": [0, 3]}, "lengths must be 2 numbers from 1 to 3, got [0, 3]"),
        ({"stop_tokens": [23]}, "stop_tokens must be from 0 to 22, got 23"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
    ],
)
def test_bad_continuations(model, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        generate.continuations(model, prompt(2, 3), **{"lengths": [3, 3], "max_new_tokens": 2} | arguments)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU PyTorch's own kernels find them")
@pytest.mark.parametrize("token", [23, -1])
def test_tokens_out_of_range(model, token):
    idx = prompt(1, 3)
    idx[0, 1] = token
    with pytest.raises(ValueError, match=f"token id {token} is out of range; accepted: 0 to 22"):
        model.generate(idx, 1)


def test_logits_that_are_no_numbers(model):
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="row 0 of the logits has NaN"):
        model.generate(prompt(1, 3), 1)


def test_greedy_is_hugging_faces(model):
    """Token for token, and beams too."""
    theirs = model_providers.providers(None)["Hugging Face"].build(model.eval())
    idx = prompt(3, 3)
    expected = theirs.generate(
        idx, attention_mask=torch.ones_like(idx), max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert torch.equal(model.generate(idx, 5, temperature=0), expected)
    expected = theirs.generate(
        idx, attention_mask=torch.ones_like(idx), max_new_tokens=5, do_sample=False, num_beams=3, pad_token_id=0
    )
    found = generate.search_beams(model, idx, [3] * 3, 5, num_beams=3)
    assert [hypotheses[0].tokens for hypotheses in found] == expected[:, 3:].tolist()


def test_beams_of_generate_are_hugging_faces(model):
    """With penalties too, which change log-probabilities."""
    theirs = model_providers.providers(None)["Hugging Face"].build(model.eval())
    idx = prompt(3, 3)
    arguments = {"attention_mask": torch.ones_like(idx), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    penalties = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    beams = {"num_beams": 4, "length_penalty": 0.5, "early_stopping": True}
    expected = theirs.generate(idx, num_return_sequences=2, **arguments, **penalties, **beams)
    found = model.generate(idx, 6, **penalties, **beams, num_samples=2)
    assert torch.equal(found, expected)
    assert not torch.equal(found, model.generate(idx, 6, **beams, num_samples=2))


def test_beams_end_with_a_stop_token(model):
    idx = prompt(2, 3)
    free = model.generate(idx, 6, num_beams=3)
    stop = int(free[0, 4])
    found = model.generate(idx, 6, num_beams=3, stop_tokens=[stop])
    hypotheses = generate.search_beams(model, idx, [3, 3], 6, 3, stop_tokens=[stop])
    for row, (best, *_) in zip(found[:, 3:].tolist(), hypotheses, strict=True):
        assert row == best.tokens + best.tokens[-1:] * (len(row) - len(best.tokens))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.7, "top_k": 3}, "num_beams=2 searches and draws nothing; it excludes temperature, top_k"),
        ({"min_p": 0.1}, "num_beams=2 searches and draws nothing; it excludes min_p"),
        ({"compiled": True}, "num_beams=2 excludes a draft and a compiled step: both are for drawing tokens"),
        ({"num_samples": 3}, "num_return_sequences must be from 1 to num_beams=2, got 3"),
    ],
)
def test_what_beams_exclude(model, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate(prompt(1, 3), 4, num_beams=2, **settings)


def test_a_draft_of_generate(model):
    draft = Draft(model)
    idx = prompt(2, 3)
    assert torch.equal(model.generate(idx, 6, temperature=0, draft=draft), model.generate(idx, 6, temperature=0))
    assert draft.acceptance_rate == 1.0
    with pytest.raises(ValueError, match="a draft excludes a compiled step"):
        model.generate(idx, 6, draft=draft, compiled=True)
