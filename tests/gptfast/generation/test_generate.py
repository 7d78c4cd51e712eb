"""Continuations of token ids: settings, batches, stop tokens, and equality with Hugging Face."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks.measuring import model_bench
from gptfast import GPT, Draft, Sampling
from gptfast.generation import generate
from gptfast.generation.autoregressive import decode_n_tokens
from gptfast.generation.beam_search import BeamSearch
from gptfast.generation.decoder import GenerationRequest
from tests.support.generation import GREEDY, generator, gpt, prompts, request
from tests.support.oracle import DEVICE


@pytest.fixture
def model() -> GPT:
    return gpt(block_size=8, n_embd=16, dropout=0.5).train()


def prompt(rows: int, length: int) -> torch.Tensor:
    return prompts(*[length] * rows)


def test_greedy_takes_the_likeliest_token_of_the_last_window(model):
    idx = prompt(2, 3)
    result = model.generate(idx, 12, temperature=0.0)
    assert result.shape == (2, 15)
    assert torch.equal(result[:, :3], idx)
    model.eval()
    for end in range(3, 15):
        logits, _ = model(result[:, max(0, end - 8) : end])
        assert torch.equal(result[:, end], logits[:, -1].argmax(-1))


def test_a_generator_makes_sampling_repeatable(model):
    idx = prompt(1, 3)
    first = model.generate(idx, 20, generator=generator())
    assert torch.equal(first, model.generate(idx, 20, generator=generator()))
    assert not torch.equal(first, model.generate(idx, 20, generator=generator(1)))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(model, training):
    model.train(training)
    model.generate(prompt(1, 3), 1)
    assert model.training is training


def test_no_new_tokens_return_the_prompts(model):
    assert torch.equal(model.generate(prompt(2, 3), 0), prompt(2, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"stop_tokens": [23]}, "stop_tokens must be from 0 to 22, got 23"),
        ({"idx": torch.zeros(1, 0, dtype=torch.long)}, "idx must be [B, T] with T >= 1, got shape (1, 0)"),
        ({"num_beams": 2, "temperature": 0.7, "top_k": 3}, "num_beams=2 searches and draws nothing; it excludes temp"),
        ({"num_beams": 2, "min_p": 0.1}, "num_beams=2 searches and draws nothing; it excludes min_p"),
        ({"num_beams": 2, "compiled": True}, "num_beams=2 excludes a draft and a compiled step"),
        ({"num_beams": 2, "num_samples": 3}, "num_return_sequences must be from 1 to num_beams=2, got 3"),
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate(**{"idx": prompt(1, 3), "max_new_tokens": 1} | arguments)


@pytest.mark.parametrize("lengths", [[3], [3, 4], [0, 3]], ids=str)
def test_lengths_out_of_range_are_refused(lengths):
    with pytest.raises(ValueError, match=re.escape(f"lengths must be 2 numbers from 1 to 3, got {lengths}")):
        GenerationRequest(prompt(2, 3), lengths, 2)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="PyTorch's own kernels check tokens on a GPU")
@pytest.mark.parametrize("token", [23, -1])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_tokens_out_of_range_are_refused(model, token, options):
    idx = prompt(1, 3)
    idx[0, 1] = token
    with pytest.raises(ValueError, match=f"token id {token} is out of range"):
        model.generate(idx, 1, **options)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[3, 3], [1, 5, 3], [8, 2], [6, 7, 1]], ids=str)
def test_log_probabilities_are_the_models_own(model, lengths):
    """Within the window and past it."""
    chosen = Sampling(temperature=0.5, top_k=3, repetition_penalty=1.3)
    found = generate.continuations(model, request(lengths, 9, chosen, generator=generator()))
    model.eval()
    for sequence, length, (continuation,) in zip(prompts(*lengths), lengths, found, strict=True):
        whole = torch.cat((sequence[:length], torch.tensor(continuation.tokens, device=DEVICE)))
        for end, log_prob in enumerate(continuation.log_probs, start=length):
            expected = model(whole[None, max(0, end - 8) : end])[0][0, -1].log_softmax(-1)[whole[end]].item()
            assert log_prob == pytest.approx(expected, abs=1e-4)


def test_a_stop_token_ends_a_sequence_and_not_the_others(model):
    asked = request([2, 4, 3], 8)
    free = generate.continuations(model, asked)
    stop = free[1][0].tokens[2]
    found = generate.continuations(model, asked, stop_tokens=[stop])
    for (with_stop,), (without,) in zip(found, free, strict=True):
        end = without.tokens.index(stop) + 1 if stop in without.tokens else 8
        assert with_stop.tokens == without.tokens[:end]
        assert with_stop.finished is (stop in without.tokens)
    assert len(found[1][0].tokens) <= 3


def test_finished_sequences_leave_the_batch(model, reads):
    idx = torch.tensor([[1, 2, 3], [9, 8, 7], [15, 4, 20]], device=DEVICE)
    first = model.generate(idx, 1, temperature=0)[:, 3].tolist()
    assert first[1] != first[0] != first[2]
    for stops, expected in ((first[:1], [3, 2]), (first, [3])):
        reads.clear()
        asked = GenerationRequest(
            idx, [3] * 3, 3, GREEDY, lambda row, token, stops=stops: token in stops, cuda_graph=False, run_ahead=False
        )
        list(decode_n_tokens(model, asked))
        assert [shape[0] for _, shape in reads][:2] == expected


def test_rows_are_filled_up_with_their_stop_token(model):
    idx = prompt(2, 3)
    free = model.generate(idx, 6, temperature=0)
    stop = free[0, 4].item()
    result = model.generate(idx, 6, temperature=0, stop_tokens=[stop])
    end = free[0, 3:].tolist().index(stop) + 4
    assert result[0, :end].tolist() == free[0, :end].tolist()
    assert set(result[0, end:].tolist()) <= {stop}


def test_several_samples_of_a_prompt_are_adjacent_rows(model):
    idx = prompt(2, 3)
    result = model.generate(idx, 10, num_samples=3, generator=generator())
    assert result.shape == (6, 13)
    assert torch.equal(result[:, :3], idx.repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in result[:3].tolist()}) > 1
    found = generate.continuations(model, request([3, 3], 10, Sampling(), generator=generator()), num_samples=3)
    assert [len(samples) for samples in found] == [3, 3]
    assert [c.tokens for samples in found for c in samples] == result[:, 3:].tolist()


@pytest.mark.parametrize(
    "settings",
    [{"top_p": 0.3}, {"min_p": 0.5}, {"typical_p": 0.2}, {"repetition_penalty": 2.0}, {"presence_penalty": 3.0},
     {"frequency_penalty": 2.0}, {"no_repeat_ngram_size": 1}],
    ids=str,
)  # fmt: skip
def test_every_setting_changes_what_is_drawn(model, settings):
    found, free = (model.generate(prompt(1, 3), 30, generator=generator(), **s) for s in (settings, {}))
    assert not torch.equal(found, free)


BEAMS = {"num_beams": 4, "length_penalty": 0.5, "early_stopping": True}
PENALTIES = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, BEAMS, PENALTIES, PENALTIES | BEAMS],
    ids=["greedy", "beams", "length penalty", "penalties", "penalised beams"],
)  # fmt: skip
def test_tokens_equal_hugging_face(model, settings):
    theirs = model_bench.providers(None)["Hugging Face"].build(model.eval())
    idx, samples = prompt(3, 3), min(2, settings.get("num_beams", 1))
    expected = theirs.generate(
        idx, attention_mask=torch.ones_like(idx), max_new_tokens=5, do_sample=False, pad_token_id=0,
        num_return_sequences=samples, **settings,
    )  # fmt: skip
    assert torch.equal(model.generate(idx, 5, temperature=0, num_samples=samples, **settings), expected)


def test_beams_end_with_a_stop_token(model):
    free = model.generate(prompt(2, 3), 6, num_beams=3)
    stop = int(free[0, 4])
    found = model.generate(prompt(2, 3), 6, num_beams=3, stop_tokens=[stop])
    hypotheses = generate.search_beams(model, request([3, 3], 6), BeamSearch(3), stop_tokens=[stop])
    for row, (best, *_) in zip(found[:, 3:].tolist(), hypotheses, strict=True):
        assert row == best.tokens + best.tokens[-1:] * (len(row) - len(best.tokens))


def test_a_draft_changes_no_greedy_token(model):
    draft, idx = Draft(model), prompt(2, 3)
    assert torch.equal(model.generate(idx, 6, temperature=0, draft=draft), model.generate(idx, 6, temperature=0))
    assert draft.acceptance_rate == 1.0
    with pytest.raises(ValueError, match=r"draft.*compiled"):
        model.generate(idx, 6, draft=draft, compiled=True)
