"""Whatever a draft proposes, what comes out is the larger model's own."""

from __future__ import annotations

import functools
import itertools
import math
import re

import pytest
import torch
from torch import Tensor

from gptfast import GPT
from gptfast.generation import decoder, rounds, speculative
from gptfast.generation.autoregressive import Step, steps
from gptfast.generation.kv_cache import KVCache
from gptfast.generation.sampling import Sampling
from gptfast.generation.speculative import Draft
from tests.support.drafts import DRAFTS, GREEDY, assert_as_plain, contrary, generator, gpt, merged, perturbed, ragged
from tests.support.oracle import DEVICE


@pytest.fixture
def reads(monkeypatch) -> list[tuple[int, int]]:
    """Whose transformer read how many tokens, at each call; the same embedding in memory is the same model."""
    called: list[tuple[int, int]] = []
    monkeypatch.setattr(speculative, "Rounds", functools.partial(rounds.Rounds, graph=False))  # which would hide calls
    kind = type(gpt(n_layer=1).transformer)
    forward = kind.forward
    monkeypatch.setattr(
        kind,
        "forward",
        lambda self, idx, *a: called.append((self.wte.weight.data_ptr(), idx.shape[1])) or forward(self, idx, *a),
    )
    return called


def of(called: list[tuple[int, int]], model: GPT) -> list[int]:
    return [count for whose, count in called if whose == model.transformer.wte.weight.data_ptr()]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("make", DRAFTS.values(), ids=DRAFTS)
def test_greedy_is_the_plain_loop_within_the_window_and_beyond(make, count):
    model, lengths = gpt(), [1, 5, 3, 16, 20]
    assert_as_plain(model, Draft(make(model), count), ragged(*lengths), lengths, 18, GREEDY)


@pytest.mark.parametrize("make", DRAFTS.values(), ids=DRAFTS)
def test_the_likeliest_of_one_is_greedy(make):
    """Drawn and verified, where temperature 0 compares tokens."""
    model, lengths = gpt(), [5, 14]
    idx, draft, greedy = ragged(*lengths), Draft(make(model), 3), Draft(make(model), 3)
    found = list(speculative.steps(model, draft, idx, lengths, 9, Sampling(top_k=1)))
    assert found == list(speculative.steps(model, greedy, idx, lengths, 9, GREEDY))
    assert (draft.proposed, draft.accepted) == (greedy.proposed, greedy.accepted)


@pytest.mark.parametrize("chunk", [2, 512])
@pytest.mark.parametrize("make", DRAFTS.values(), ids=DRAFTS)
def test_penalties_and_ngrams_see_what_was_proposed(monkeypatch, make, chunk):
    """In the draft's distribution too: the model as its own draft is always right. Prompts are read piece by piece."""
    monkeypatch.setattr(decoder, "CHUNK", chunk)
    model, lengths = gpt(), [6, 9, 2]
    for settings in (
        Sampling(temperature=0.0, repetition_penalty=1.5, no_repeat_ngram_size=2),
        Sampling(temperature=0.0, presence_penalty=2.0, frequency_penalty=1.0),
    ):
        draft = Draft(make(model), 3)
        assert_as_plain(model, draft, ragged(*lengths), lengths, 16, settings)
        assert draft.acceptance_rate == 1.0 or draft.model is not model


@pytest.mark.parametrize(
    "changes",
    [{"block_size": 7}, {"block_size": 40}, {"n_layer": 1, "n_embd": 16, "pad_vocab_size_to": 32},
     {"norm_position": "post", "position": "sinusoidal"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draft_may_be_of_any_shape_and_dtype(changes, dtype):
    model, draft, lengths = gpt(pad_vocab_size_to=8), gpt(1, **changes).to(dtype), [1, 6, 9]
    assert_as_plain(model, Draft(draft, 3), ragged(*lengths), lengths, 12, GREEDY)


@pytest.mark.parametrize("backends", [("triton", "triton"), ("triton", "eager"), ("eager", "triton")], ids=str)
def test_backends(backends):
    small = {"n_layer": 1, "n_embd": 16, "n_head": 1, "block_size": 8}
    model, draft = gpt(backend=backends[0], **small), gpt(1, backend=backends[1], **small)
    expected = merged(steps(gpt(**small), ragged(3), [3], 7, GREEDY), 1)
    found = merged(speculative.steps(model, Draft(draft, 2), ragged(3), [3], 7, GREEDY), 1)
    assert found[0][0] == expected[0][0]
    assert found[0][1] == pytest.approx(expected[0][1], abs=1e-4)


def test_what_is_accepted_need_not_be_read_alone(reads):
    """A draft that is always right: the model is called once for four tokens, the draft reads its last one later.

    Of the prompts all but the last token is read before.
    """
    model, same = gpt(block_size=40), gpt(block_size=40)
    draft = Draft(same, 3)
    list(speculative.steps(model, draft, ragged(5), [5], 14, GREEDY))
    assert of(reads, model) == [4, 4, 4, 4, 2]
    assert of(reads, same) == [4, 1, 1, 1, 2, 1, 1, 2, 1, 1, 2]
    assert (draft.proposed, draft.accepted) == (10, 10)
    assert draft.acceptance_rate == 1.0


def test_what_is_rejected_costs_nothing_but_time(reads):
    """A draft that is always wrong: a call for each token. Near the end it proposes less."""
    model = gpt(block_size=40)
    other = contrary(model)
    draft = Draft(other, 3)
    list(speculative.steps(model, draft, ragged(5), [5], 6, GREEDY))
    assert of(reads, model) == [4, 4, 4, 4, 3, 2, 1]
    assert of(reads, other) == [4] + [1] * 12
    assert (draft.proposed, draft.accepted) == (12, 0)
    assert draft.acceptance_rate == 0.0


def test_where_proposals_do_not_fit_into_a_window_the_model_goes_on_alone(reads):
    """It reads what is there anew, then token by token, until its own window has to move."""
    model, other = gpt(block_size=12), gpt(1, block_size=9)
    draft = Draft(contrary(other), 2)
    list(speculative.steps(model, draft, ragged(7), [7], 8, GREEDY))
    # sequences of 7, 8, ... 14 tokens
    assert of(reads, model) == [6, 3, 8, 1, 1, 1, 1, 12, 12]
    assert draft.proposed == 2
    reads.clear()
    draft = Draft(contrary(model), 4)
    list(speculative.steps(model, draft, ragged(7), [7], 8, GREEDY))
    assert of(reads, model) == [6, 5, 5, 9, 1, 1, 1, 12, 12]
    assert draft.proposed == 4 + 4
    reads.clear()
    list(speculative.steps(model, Draft(contrary(model), 6), ragged(7), [7], 2, GREEDY))
    assert of(reads, model) == [7, 1]


@pytest.mark.parametrize(("new", "capacities"), [(2, [9, 9]), (4, [11, 9]), (1000, [16, 9])])
def test_caches_are_no_larger_than_windows(monkeypatch, new, capacities):
    made = []
    monkeypatch.setattr(rounds, "KVCache", lambda *size: made.append(size[1]) or KVCache(*size))
    next(speculative.steps(gpt(), Draft(gpt(1, block_size=9)), ragged(3), [3], new))
    assert made == capacities


def test_both_models_are_made_ready_for_as_many_tokens_as_may_come(monkeypatch):
    made, model, other = [], gpt(), gpt(1)
    monkeypatch.setattr(rounds, "for_decoding", lambda *given: made.append(given) or given[0])
    next(speculative.steps(model, Draft(other), ragged(3, 9), [3, 9], 7))
    assert made == [(model, 14), (other, 14)]


def test_counters_go_on():
    model = gpt()
    draft = Draft(model, 2)
    assert math.isnan(draft.acceptance_rate)
    for uses in (1, 2):
        list(speculative.steps(model, draft, ragged(2, 4), [2, 4], 3, GREEDY))
        assert (draft.proposed, draft.accepted) == (4 * uses, 4 * uses)
    draft.proposed, draft.accepted = 8, 2
    assert draft.acceptance_rate == 0.25


def test_some_are_accepted_and_some_are_not():
    """The tests above know the two extremes."""
    model = gpt(block_size=64)
    draft = Draft(perturbed(model, 0.02), 4)
    list(speculative.steps(model, draft, ragged(3), [3], 50, GREEDY))
    assert 0.2 < draft.acceptance_rate < 0.8


@torch.no_grad()
@pytest.mark.parametrize("make", DRAFTS.values(), ids=DRAFTS)
def test_log_probabilities_are_the_models_own(make):
    """Of every token, accepted or not, before temperature, penalties and filters."""
    model, lengths = gpt(block_size=24), [4, 6]
    idx, chosen = ragged(*lengths), Sampling(temperature=0.5, top_k=5, repetition_penalty=1.3)
    found = merged(speculative.steps(model, Draft(make(model), 3), idx, lengths, 12, chosen, generator=generator()), 2)
    for (tokens, log_probs), row, length in zip(found, idx, lengths, strict=True):
        whole = torch.cat((row[:length], torch.tensor(tokens, device=DEVICE)))[None]
        logits = model.logits(model.transformer(whole))[0, length - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, whole[0, length:, None])[:, 0]
        assert log_probs == pytest.approx(expected.tolist(), abs=1e-4)


def test_log_probabilities_nobody_asked_for():
    model = gpt()
    found = list(speculative.steps(model, Draft(model), ragged(3), [3], 5, GREEDY, log_probs=False))
    asked = list(speculative.steps(model, Draft(model), ragged(3), [3], 5, GREEDY))
    assert [step.log_probs for step in found] == [[]] * 5
    assert [step[:2] for step in found] == [step[:2] for step in asked]


def test_steps_can_stand_in_the_place_of_the_plain_ones():
    """Rows, tokens and numbers, as plain Python has them; some rows are ahead of others."""
    model, lengths = gpt(), [2, 3]
    found = list(speculative.steps(model, Draft(perturbed(model), 3), ragged(*lengths), lengths, 6, GREEDY))
    assert {tuple(step.rows) for step in found} >= {(0, 1), (1,)}
    assert [sum(row in step.rows for step in found) for row in (0, 1)] == [6, 6]
    for step in found:
        assert isinstance(step, Step)
        assert [type(part[0]) for part in step] == [int, int, float]


def test_a_generator_makes_sampling_repeatable():
    model = gpt()
    draft = Draft(perturbed(model), 3)

    def written(seed: int) -> list:
        idx = ragged(3, 5)
        return list(speculative.steps(model, draft, idx, [3, 5], 20, generator=generator(seed), log_probs=False))

    first = written(0)
    torch.manual_seed(1)  # nor does PyTorch's own generator matter
    assert first == written(0)
    assert first != written(1)
    state = torch.get_rng_state()
    written(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_greedy_draws_no_random_number():
    model = gpt()
    random = generator()
    state = random.get_state()
    list(speculative.steps(model, Draft(perturbed(model)), ragged(3), [3], 6, GREEDY, generator=random))
    assert torch.equal(random.get_state(), state)


@pytest.mark.parametrize("place", range(6))
def test_a_sequence_ends_within_a_round(place):
    """Wherever in it; the other goes on. The end is asked for after the step was given out."""
    model, lengths = gpt(), [3, 5]
    idx, draft = ragged(*lengths), Draft(model, 3)
    free = merged(steps(model, idx, lengths, 9, GREEDY), 2)
    given: list[tuple[int, int]] = []

    def ends(row: int, token: int) -> bool:
        assert (row, token) in given[-2:]
        return row == 0 and sum(other == 0 for other, _ in given) == place + 1

    for step in speculative.steps(model, draft, idx, lengths, 9, GREEDY, ends):
        given += zip(step.rows, step.tokens, strict=True)
    assert [token for row, token in given if row == 0] == free[0][0][: place + 1]
    assert [token for row, token in given if row == 1] == free[1][0]


def test_nothing_is_computed_beyond_the_end(reads):
    model = gpt()
    draft = Draft(model, 3)
    assert len(list(speculative.steps(model, draft, ragged(3), [3], 9, GREEDY, lambda row, token: True))) == 1
    assert (draft.proposed, draft.accepted) == (3, 3)
    assert [count for _, count in reads] == [2, 2, 1, 1, 1, 4]


@pytest.mark.parametrize("new", [0, 1, 2])
def test_few_tokens_or_none(new, reads):
    model = gpt()
    draft = Draft(model, 4)
    found = list(speculative.steps(model, draft, ragged(3), [3], new, GREEDY))
    assert len(found) == new
    assert [count for _, count in reads] == [[], [2, 2, 1], [2, 2, 1, 2]][new]
    assert draft.proposed == [0, 0, 1][new]


def test_no_prompts():
    model = gpt()
    assert list(speculative.steps(model, Draft(model), torch.zeros(0, 3, dtype=torch.int64), [], 5)) == []


@pytest.mark.parametrize("training", [True, False])
def test_the_modes_of_both_models_are_left_alone(training):
    """Even by those who leave early; and dropout is off."""
    model, other = gpt(dropout=0.5), gpt(1, dropout=0.5)
    expected = merged(steps(model, ragged(3), [3], 6, GREEDY), 1)
    model.train(training)
    other.train(not training)
    assert merged(speculative.steps(model, Draft(other), ragged(3), [3], 6, GREEDY), 1)[0][0] == expected[0][0]
    assert (model.training, other.training) == (training, not training)
    begun = speculative.steps(model, Draft(other), ragged(3), [3], 6, GREEDY)
    next(begun)
    assert not model.training
    assert not other.training
    begun.close()
    assert (model.training, other.training) == (training, not training)
    list(speculative.steps(model, Draft(model), ragged(3), [3], 6, GREEDY))
    assert model.training is training


def test_gradients_are_off_within_and_left_alone_without():
    model, other, within = gpt(), gpt(1), []
    for each in (model, other):
        each.transformer.register_forward_hook(lambda *_: within.append(torch.is_grad_enabled()))
    for _ in speculative.steps(model, Draft(other), ragged(3), [3], 4, GREEDY):
        assert torch.is_grad_enabled()
    assert within
    assert not any(within)


def test_a_round_reads_from_the_device_once(monkeypatch):
    """On tensors without values: what asks for one raises. All that is read is counted, and taken for zeros."""
    model, other, read = gpt().to("meta"), gpt(1).to("meta"), []
    monkeypatch.setattr(
        Tensor, "cpu", lambda told: read.append(told) or torch.zeros(told.shape, dtype=told.dtype, device="cpu")
    )
    everything = Sampling(
        temperature=0.8, top_k=9, top_p=0.9, min_p=0.02, typical_p=0.8, repetition_penalty=1.3, presence_penalty=0.4,
        frequency_penalty=0.2, no_repeat_ngram_size=2,
    )  # fmt: skip
    for settings in (everything, GREEDY):
        found = list(speculative.steps(model, Draft(other, 3), ragged(4).to("meta"), [4], 6, settings))
        assert [step.tokens for step in found] == [[0]] * 6
    assert len(read) == 2 * 6  # all zeros: nothing is accepted


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(0, "tokens must be at least 1, got 0"), (-3, "tokens must be at least 1, got -3"),
     (True, "tokens must be an integer, got True"), (2.0, "tokens must be an integer, got 2.0")],
)  # fmt: skip
def test_bad_numbers_of_proposals(tokens, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Draft(gpt(n_layer=1), tokens)


def test_drafts_that_do_not_fit():
    model = gpt()
    with pytest.raises(ValueError, match=r"^draft.model has a vocabulary of 50 tokens, the model one of 23; "):
        next(speculative.steps(model, Draft(gpt(vocab_size=50)), ragged(3), [3], 5))
    # the rows in memory do not count
    padded = Draft(gpt(1, pad_vocab_size_to=64))
    assert_as_plain(model, padded, ragged(3), [3], 5, GREEDY)
    with pytest.raises(ValueError, match=rf"^draft.model is on meta, the model on {DEVICE.type}"):
        next(speculative.steps(model, Draft(gpt(1).to("meta")), ragged(3), [3], 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [3]}, "lengths must be 2 numbers from 1 to 3, got [3]"),
        ({"lengths": [0, 3]}, "lengths must be 2 numbers from 1 to 3, got [0, 3]"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
    ],
)
def test_bad_prompts(arguments, message):
    model = gpt()
    with pytest.raises(ValueError, match=re.escape(message)):
        next(
            speculative.steps(model, Draft(model), ragged(3, 3), **{"lengths": [3, 3], "max_new_tokens": 2} | arguments)
        )


@pytest.mark.parametrize(("value", "found"), [(math.nan, "NaN"), (math.inf, "NaN|inf")])
def test_logits_that_are_no_numbers(value, found):
    model, broken = gpt(), gpt()
    with torch.no_grad():
        broken.transformer.ln_f.weight.fill_(value)
    with pytest.raises(ValueError, match=rf"^row 0 of the logits has ({found})"):
        list(speculative.steps(broken, Draft(model), ragged(3), [3], 5))
    with pytest.raises(ValueError, match=rf"^draft.model: row 0 of the logits has ({found})"):
        list(speculative.steps(model, Draft(broken), ragged(3), [3], 5))


def test_tokens_before_those_that_are_no_numbers_are_given_out(monkeypatch):
    """As the plain loop does."""
    model = gpt()
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda x: logits(x).index_fill(1, torch.tensor([2], device=DEVICE), math.nan))
    begun = speculative.steps(model, Draft(gpt(), 3), ragged(3), [3], 5, GREEDY)
    assert len([next(begun), next(begun)]) == 2
    with pytest.raises(ValueError, match="row 0 of the logits has NaN"):
        next(begun)


def test_every_continuation_of_a_window_is_greedy():
    """Prompts of all lengths up to beyond the window, and all numbers of tokens: rounds end where they have to."""
    model = gpt(block_size=6, n_layer=1, n_embd=16)
    draft = Draft(perturbed(model), 3)
    for length, new in itertools.product(range(1, 9), (1, 2, 3, 7)):
        assert_as_plain(model, draft, ragged(length), [length], new, GREEDY)
