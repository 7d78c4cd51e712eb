"""Whatever a draft proposes, the tokens are the larger model's own."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from gptfast import GPT, Draft, Sampling
from gptfast.generation import decoder, speculative
from gptfast.generation.autoregressive import Step, decode_n_tokens
from gptfast.generation.decoder import GenerationRequest
from gptfast.generation.kv_cache import KVCache
from gptfast.generation.sampling import exponential_noise, filter_logits, process_logits
from gptfast.generation.speculative import rejection_sample, speculative_decode
from tests.support.generation import (
    DRAFTS,
    GREEDY,
    assert_as_plain,
    by_row,
    contrary,
    generator,
    gpt,
    perturbed,
    prompts,
    request,
)  # fmt: skip
from tests.support.logits import EVERYTHING, assert_distributed
from tests.support.oracle import DEVICE

ALL_DRAFTS = pytest.mark.parametrize("make", DRAFTS.values(), ids=DRAFTS)
PENALIZED = Sampling(
    temperature=0.9, top_k=15, top_p=0.95, repetition_penalty=1.2, frequency_penalty=0.3, no_repeat_ngram_size=3
)


def decode(
    model: GPT, draft: Draft, lengths: list[int], new: int, sampling: Sampling = GREEDY, **options
) -> list[Step]:
    return list(speculative_decode(model, draft, request(lengths, new, sampling, **options)))


def tokens_of(steps: list[Step], rows: int) -> list[list[int]]:
    return [tokens for tokens, _ in by_row(steps, rows)]


@ALL_DRAFTS
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_greedy_tokens_are_those_without_a_draft(make, count):
    """Within the window and past it."""
    model = gpt()
    assert_as_plain(model, Draft(make(model), count), [1, 5, 3, 16, 20], 18)


def test_greedy_tokens_of_all_lengths_around_a_window():
    model = gpt(block_size=6, n_layer=1, n_embd=16)
    draft = Draft(perturbed(model), 3)
    for length, new in itertools.product(range(1, 9), (1, 2, 3, 7)):
        assert_as_plain(model, draft, [length], new)


@ALL_DRAFTS
def test_top_1_is_greedy(make):
    """Rejection sampling and comparing tokens give the same."""
    model = gpt()
    draft, greedy = Draft(make(model), 3), Draft(make(model), 3)
    assert decode(model, draft, [5, 14], 9, Sampling(top_k=1)) == decode(model, greedy, [5, 14], 9)
    assert (draft.proposed, draft.accepted) == (greedy.proposed, greedy.accepted)


@ALL_DRAFTS
@pytest.mark.parametrize("chunk", [2, 512])
@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}, {"presence_penalty": 2.0, "frequency_penalty": 1.0}],
    ids=str,
)
def test_penalties_count_proposed_tokens(monkeypatch, make, chunk, settings):
    """In the draft's distribution too: the model as its own draft is always right."""
    monkeypatch.setattr(decoder, "CHUNK", chunk)
    model = gpt()
    draft = Draft(make(model), 3)
    assert_as_plain(model, draft, [6, 9, 2], 16, Sampling(temperature=0.0, **settings))
    assert draft.acceptance_rate == 1.0 or draft.model is not model


@pytest.mark.parametrize(
    "changes",
    [{"block_size": 7}, {"block_size": 40}, {"n_layer": 1, "n_embd": 16, "pad_vocab_size_to": 32},
     {"norm_position": "post", "position": "sinusoidal"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draft_may_have_any_shape_and_dtype(changes, dtype):
    assert_as_plain(gpt(pad_vocab_size_to=8), Draft(gpt(1, **changes).to(dtype), 3), [1, 6, 9], 12)


@pytest.mark.parametrize("backends", [("triton", "triton"), ("triton", "eager"), ("eager", "triton")], ids=str)
def test_every_backend_decodes_the_same_tokens(backends):
    small = {"n_layer": 1, "n_embd": 16, "n_head": 1, "block_size": 8}
    model, draft = gpt(backend=backends[0], **small), gpt(1, backend=backends[1], **small)
    ((expected, log_probs),) = by_row(decode_n_tokens(gpt(**small), request([3], 7)), 1)
    assert by_row(decode(model, Draft(draft, 2), [3], 7), 1) == [(expected, pytest.approx(log_probs, abs=1e-4))]


def token_counts(reads: list, model: GPT) -> list[int]:
    """Tokens per sequence at each call of a model."""
    address = model.transformer.wte.weight.data_ptr()
    return [shape[1] for where, shape in reads if where == address]


def test_accepted_tokens_need_no_call_of_their_own(reads):
    """With a draft that is always right, one call of the model gives four tokens; the draft catches up later."""
    model, same = gpt(block_size=40), gpt(block_size=40)
    draft = Draft(same, 3)
    decode(model, draft, [5], 14, cuda_graph=False)
    assert token_counts(reads, model) == [4, 4, 4, 4, 2]
    assert token_counts(reads, same) == [4, 1, 1, 1, 2, 1, 1, 2, 1, 1, 2]
    assert (draft.proposed, draft.accepted) == (10, 10)
    assert draft.acceptance_rate == 1.0


def test_rejected_tokens_cost_a_call_for_each_token(reads):
    """Near the end the draft proposes less."""
    model = gpt(block_size=40)
    draft = Draft(contrary(model), 3)
    decode(model, draft, [5], 6, cuda_graph=False)
    assert token_counts(reads, model) == [4, 4, 4, 4, 3, 2, 1]
    assert token_counts(reads, draft.model) == [4] + [1] * 12
    assert (draft.proposed, draft.accepted) == (12, 0)
    assert draft.acceptance_rate == 0.0


@pytest.mark.parametrize(
    ("draft_window", "count", "new", "expected", "proposed"),
    [
        (9, 2, 8, [6, 3, 8, 1, 1, 1, 1, 12, 12], 2),
        (12, 4, 8, [6, 5, 5, 9, 1, 1, 1, 12, 12], 8),
        (12, 6, 2, [7, 1], 0),
    ],
)
def test_the_model_continues_alone_where_proposals_do_not_fit(reads, draft_window, count, new, expected, proposed):
    """It reads the sequence again, then single tokens until its own window moves."""
    model = gpt(block_size=12)
    draft = Draft(contrary(gpt(1, block_size=draft_window)), count)
    decode(model, draft, [7], new, cuda_graph=False)
    assert token_counts(reads, model) == expected
    assert draft.proposed == proposed


@pytest.mark.parametrize(("new", "capacities"), [(2, [9, 9]), (4, [11, 9]), (1000, [16, 9])])
def test_caches_are_no_larger_than_windows(monkeypatch, new, capacities):
    made = []
    monkeypatch.setattr(speculative, "KVCache", lambda *size: made.append(size[1]) or KVCache(*size))
    next(speculative_decode(gpt(), Draft(gpt(1, block_size=9)), request([3], new, Sampling())))
    assert made == capacities


def test_both_models_are_packed_for_the_tokens_of_the_batch(monkeypatch):
    made, model, other = [], gpt(), gpt(1)
    monkeypatch.setattr(speculative, "for_decoding", lambda *given: made.append(given) or given[0])
    next(speculative_decode(model, Draft(other), request([3, 9], 7, Sampling())))
    assert made == [(model, 14), (other, 14)]


def test_counters_of_a_draft_add_up():
    model = gpt()
    draft = Draft(model, 2)
    assert math.isnan(draft.acceptance_rate)
    for uses in (1, 2):
        decode(model, draft, [2, 4], 3)
        assert (draft.proposed, draft.accepted) == (4 * uses, 4 * uses)


@torch.no_grad()
@ALL_DRAFTS
def test_log_probabilities_are_the_models_own(make):
    """Log-probabilities of accepted and other tokens, before temperature, penalties and filters."""
    model, asked = gpt(block_size=24), Sampling(temperature=0.5, top_k=5, repetition_penalty=1.3)
    found = by_row(decode(model, Draft(make(model), 3), [4, 6], 12, asked, generator=generator()), 2)
    for (tokens, log_probs), row, length in zip(found, prompts(4, 6), (4, 6), strict=True):
        whole = torch.cat((row[:length], torch.tensor(tokens, device=DEVICE)))[None]
        logits = model.logits(model.transformer(whole))[0, length - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, whole[0, length:, None])[:, 0]
        assert log_probs == pytest.approx(expected.tolist(), abs=1e-4)


def test_log_probabilities_are_optional():
    model = gpt()
    found, asked = (decode(model, Draft(model), [3], 5, log_probs=log_probs) for log_probs in (False, True))
    assert [step.log_probs for step in found] == [[]] * 5
    assert [step[:2] for step in found] == [step[:2] for step in asked]


def test_a_generator_makes_sampling_repeatable():
    model = gpt()
    draft = Draft(perturbed(model), 3)

    def sampled(seed: int) -> list:
        return decode(model, draft, [3, 5], 20, Sampling(), generator=generator(seed), log_probs=False)

    first = sampled(0)
    torch.manual_seed(1)  # PyTorch's default generator does not matter
    state = torch.get_rng_state()
    assert first == sampled(0)
    assert first != sampled(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_greedy_draws_no_random_number():
    model, random = gpt(), generator()
    state = random.get_state()
    decode(model, Draft(perturbed(model)), [3], 6, generator=random)
    assert torch.equal(random.get_state(), state)


@pytest.mark.parametrize("place", range(6))
def test_a_sequence_may_finish_anywhere_in_a_round(place):
    """The other continues. `is_finished` is called after the step was yielded."""
    model = gpt()
    free = tokens_of(list(decode_n_tokens(model, request([3, 5], 9))), 2)
    given: list[tuple[int, int]] = []

    def is_finished(row: int, token: int) -> bool:
        assert (row, token) in given[-2:]
        return row == 0 and sum(other == 0 for other, _ in given) == place + 1

    for step in speculative_decode(model, Draft(model, 3), request([3, 5], 9, is_finished=is_finished)):
        given += zip(step.rows, step.tokens, strict=True)
    assert [token for row, token in given if row == 0] == free[0][: place + 1]
    assert [token for row, token in given if row == 1] == free[1]


def test_nothing_is_computed_beyond_the_end(reads):
    model = gpt()
    draft = Draft(model, 3)
    assert len(decode(model, draft, [3], 9, is_finished=lambda row, token: True, cuda_graph=False)) == 1
    assert (draft.proposed, draft.accepted) == (3, 3)
    assert [shape[1] for _, shape in reads] == [2, 2, 1, 1, 1, 4]


@pytest.mark.parametrize(
    ("new", "counts", "proposed"), [(0, [], 0), (1, [2, 2, 1], 0), (2, [2, 2, 1, 2], 1)], ids=["none", "one", "two"]
)
def test_few_tokens_take_few_proposals(new, counts, proposed, reads):
    model = gpt()
    draft = Draft(model, 4)
    assert len(decode(model, draft, [3], new, cuda_graph=False)) == new
    assert [shape[1] for _, shape in reads] == counts
    assert draft.proposed == proposed


def test_no_prompts_give_no_steps():
    model = gpt()
    empty = GenerationRequest(torch.zeros(0, 3, dtype=torch.int64), [], 5)
    assert list(speculative_decode(model, Draft(model), empty)) == []


@pytest.mark.parametrize("training", [True, False])
def test_the_modes_of_both_models_are_restored(training):
    """After an early exit too. Dropout is off."""
    model, other = gpt(dropout=0.5), gpt(1, dropout=0.5)
    expected = tokens_of(list(decode_n_tokens(model, request([3], 6))), 1)
    model.train(training)
    other.train(not training)
    assert tokens_of(decode(model, Draft(other), [3], 6), 1) == expected
    assert (model.training, other.training) == (training, not training)
    begun = speculative_decode(model, Draft(other), request([3], 6))
    next(begun)
    assert (model.training, other.training) == (False, False)
    begun.close()
    assert (model.training, other.training) == (training, not training)
    decode(model, Draft(model), [3], 6)
    assert model.training is training


def test_gradients_are_off_inside_and_unchanged_outside():
    model, other, inside = gpt(), gpt(1), []
    for each in (model, other):
        each.transformer.register_forward_hook(lambda *_: inside.append(torch.is_grad_enabled()))
    for _ in speculative_decode(model, Draft(other), request([3], 4)):
        assert torch.is_grad_enabled()
    assert set(inside) == {False}


@pytest.mark.parametrize("sampling", [EVERYTHING, GREEDY], ids=["everything", "greedy"])
def test_a_round_synchronises_once(monkeypatch, sampling):
    """On meta tensors, which raise when a value is read. The one copy per round is counted and read as zeros."""
    model, other, copies = gpt().to("meta"), gpt(1).to("meta"), []
    monkeypatch.setattr(
        Tensor, "cpu", lambda tensor: copies.append(1) or torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
    )
    asked = GenerationRequest(prompts(4).to("meta"), [4], 6, sampling)
    found = list(speculative_decode(model, Draft(other, 3), asked))
    assert [step.tokens for step in found] == [[0]] * 6
    assert len(copies) == 6  # zeros accept nothing


@pytest.mark.parametrize("tokens", [0, -3, True, 2.0])
def test_numbers_of_proposals_out_of_range_are_refused(tokens):
    with pytest.raises(ValueError, match=rf"tokens.*{tokens}"):
        Draft(gpt(n_layer=1), tokens)


def test_drafts_that_do_not_fit_the_model_are_refused():
    model = gpt()
    with pytest.raises(ValueError, match=r"^draft\.model.*50.*23"):
        decode(model, Draft(gpt(vocab_size=50)), [3], 5)
    assert_as_plain(model, Draft(gpt(1, pad_vocab_size_to=64)), [3], 5)  # padding is no difference
    with pytest.raises(ValueError, match=rf"^draft\.model.*meta.*{DEVICE.type}"):
        decode(model, Draft(gpt(1).to("meta")), [3], 5)


@pytest.mark.parametrize(("value", "found"), [(math.nan, "NaN"), (math.inf, "NaN|inf")])
def test_logits_that_are_not_finite_are_refused(value, found):
    model, broken = gpt(), gpt()
    with torch.no_grad():
        broken.transformer.ln_f.weight.fill_(value)
    with pytest.raises(ValueError, match=rf"^row 0 of the logits has ({found})"):
        decode(broken, Draft(model), [3], 5)
    with pytest.raises(ValueError, match=rf"^draft.model: row 0 of the logits has ({found})"):
        decode(model, Draft(broken), [3], 5)


def test_tokens_before_logits_that_are_not_finite_are_yielded(monkeypatch):
    model = gpt()
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda x: logits(x).index_fill(1, torch.tensor([2], device=DEVICE), math.nan))
    begun = speculative_decode(model, Draft(gpt(), 3), request([3], 5))
    assert len([next(begun), next(begun)]) == 2
    with pytest.raises(ValueError, match="row 0 of the logits has NaN"):
        next(begun)


# rejection sampling


def probabilities(model: GPT, sequences: Tensor, prompt_length: int, sampling: Sampling) -> Tensor:
    """Distribution [B, V] of the token after sequences [B, T]."""
    lengths = torch.full((len(sequences),), sequences.shape[1], device=DEVICE)
    logits = model(sequences)[0][:, -1]
    logits = process_logits(logits, sequences, lengths, torch.full_like(lengths, prompt_length), sampling)
    return filter_logits(logits, sampling).softmax(-1)


@torch.no_grad()
def joint(model: GPT, prompt: Tensor, new: int, sampling: Sampling) -> Tensor:
    """Probability of every continuation, [V ** new]."""
    vocab_size = model.config.vocab_size
    sequences, product = prompt, torch.ones(1, device=DEVICE)
    for _ in range(new):
        product = (product[:, None] * probabilities(model, sequences, prompt.shape[1], sampling)).flatten()
        tokens = torch.arange(vocab_size, device=DEVICE).repeat(len(sequences))[:, None]
        sequences = torch.cat((sequences.repeat_interleave(vocab_size, dim=0), tokens), dim=1)
    return product


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.7, top_k=3, repetition_penalty=1.4, frequency_penalty=0.5),
     Sampling(top_p=0.8, no_repeat_ngram_size=2)],
    ids=["plain", "penalties and top-k", "ngrams and top-p"],
)  # fmt: skip
def test_continuations_follow_the_models_distribution(sampling):
    """Three tokens together, from two proposals at a time."""
    tiny = {"vocab_size": 5, "n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 6, "init_std": 0.7}
    model, prompt, samples = gpt(3, **tiny), prompts(2, vocab_size=5), 6000
    draft = Draft(gpt(4, **tiny), 2)
    asked = GenerationRequest(prompt.repeat(samples, 1), [2] * samples, 3, sampling, generator=generator())
    tokens = torch.tensor(tokens_of(list(speculative_decode(model, draft, asked)), samples))
    codes = tokens @ torch.tensor([25, 5, 1])
    assert_distributed(codes.bincount(minlength=125), joint(model, prompt, 3, sampling))
    assert 0.2 < draft.acceptance_rate < 0.9


def distributions(*shape: int, seed: int = 0) -> Tensor:
    return (2.0 * torch.randn(shape, generator=generator(seed), device=DEVICE)).softmax(-1)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_rejection_sampling_follows_p(count):
    """Each token up to the first rejection, and the one after."""
    samples, vocab_size = 300_000, 4
    p, q = distributions(count + 1, vocab_size), distributions(count + 1, vocab_size, seed=1)
    p[0, 0] = 0.0
    p, q = p / p.sum(-1, keepdim=True), q.clone()
    q[-1] = 0.0
    random = generator()
    noise = exponential_noise(torch.empty(samples, count + 1, vocab_size, device=DEVICE), random)
    proposals = (q / noise).argmax(-1)[:, :count]
    uniforms = torch.rand(samples, count, generator=random, device=DEVICE)
    accepted, tokens = rejection_sample(
        p.expand(samples, -1, -1), q.expand(samples, -1, -1), proposals, uniforms,
        exponential_noise(torch.empty(samples, vocab_size, device=DEVICE), random),
    )  # fmt: skip
    assert accepted.shape == tokens.shape == (samples,)
    assert (accepted.min(), accepted.max()) == (0, count)
    for place in range(count + 1):
        reached = accepted >= place
        # p does not depend on earlier tokens here
        proposed = proposals[:, place] if place < count else tokens
        given = torch.where(accepted > place, proposed, tokens)[reached]
        assert_distributed(given.bincount(minlength=vocab_size), p[place])
        if place < count:
            rate = (accepted > place).sum() / reached.sum()
            expected = torch.minimum(p[place], q[place]).sum()  # Leviathan et al. 2023, theorem 3.5
            assert rate.item() == pytest.approx(expected.item(), abs=0.02)


def test_equal_distributions_are_always_accepted():
    """Up to the largest uniform number below 1, for all roundings of the product."""
    p = distributions(1, 2, 1000)
    q = torch.cat((p[:, :1], torch.zeros_like(p[:, :1])), dim=1)
    proposals, uniforms = (
        torch.arange(1000, device=DEVICE)[:, None],
        torch.full((1000, 1), 1.0 - 2.0**-24, device=DEVICE),
    )
    noise = torch.ones(1000, 1000, device=DEVICE)
    accepted, _ = rejection_sample(p.expand(1000, -1, -1), q.expand(1000, -1, -1), proposals, uniforms, noise)
    assert accepted.all()


@pytest.mark.parametrize(
    ("p", "q", "proposal", "uniform"),
    [([0.0, 1.0 - 2.0**-24], [0.0, 1.0], 1, 1.0), ([0.0, 1.0], [0.5, 0.5], 0, 0.0)],
    ids=["p - q rounds to nothing", "uniform is 0"],
)
def test_tokens_of_probability_0_are_never_drawn(p, q, proposal, uniform):
    p, q = (torch.tensor([[row, last]], device=DEVICE) for row, last in ((p, [1.0, 0.0]), (q, [0.0, 0.0])))
    proposals, uniforms = torch.tensor([[proposal]], device=DEVICE), torch.tensor([[uniform]], device=DEVICE)
    accepted, tokens = rejection_sample(p, q, proposals, uniforms, torch.ones(1, 2, device=DEVICE))
    assert (accepted.tolist(), tokens.tolist()) == ([0], [1])


# rounds from CUDA graphs


@pytest.mark.parametrize(
    ("backend", "lengths", "new"),
    [("eager", [5], 16), ("eager", [1], 16), ("eager", [1, 7, 4], 16), ("triton", [1, 3], 10)], ids=str,
)  # fmt: skip
@ALL_DRAFTS
def test_replayed_rounds_give_the_tokens_without_a_draft(captures, make, lengths, new, backend):
    small = {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 24}
    model = gpt(backend=backend, **small)
    draft = Draft(make(model) if make is not DRAFTS["another"] else gpt(1, backend=backend, **small), 3)
    expected = tokens_of(list(decode_n_tokens(gpt(**small), request(lengths, new))), len(lengths))
    captures.clear()
    assert tokens_of(decode(model, draft, lengths, new, cuda_graph=True), len(lengths)) == expected
    assert captures


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), PENALIZED], ids=["greedy", "sampled", "penalties"])
@pytest.mark.parametrize("lengths", [[4], [2, 2], [1, 6, 3]], ids=str)
def test_replayed_rounds_draw_the_same_tokens(captures, lengths, sampling):
    """Until the last rounds, in which less is proposed without a graph."""
    model, own = gpt(block_size=64), generator()
    drafts = [Draft(perturbed(model), 3) for _ in range(2)]

    def first_steps(draft: Draft, random: torch.Generator, cuda_graph: bool) -> list[Step]:
        asked = request(lengths, 40, sampling, generator=random, cuda_graph=cuda_graph)
        return list(itertools.islice(speculative_decode(model, draft, asked), 20))

    found = first_steps(drafts[0], own, cuda_graph=True)
    assert captures == [own]
    for step, plain in zip(found, first_steps(drafts[1], generator(), cuda_graph=False), strict=True):
        assert step[:2] == plain[:2]
        assert step.log_probs == pytest.approx(plain.log_probs, abs=1e-4)
    assert (drafts[0].proposed, drafts[0].accepted) == (drafts[1].proposed, drafts[1].accepted)
    assert len(captures) == 1


@pytest.mark.parametrize("new", range(1, 14))
def test_proposals_beyond_the_end_are_not_counted(captures, new):
    """A graph proposes as many in the last rounds as in all."""
    model, found = gpt(block_size=32), []
    for cuda_graph in (True, False):
        draft = Draft(perturbed(model, 0.02), 4)
        tokens = tokens_of(decode(model, draft, [3, 5], new, cuda_graph=cuda_graph), 2)
        found.append((tokens, draft.proposed, draft.accepted))
    assert found[0] == found[1]
    assert [len(tokens) for tokens in found[0][0]] == [new, new]


def test_all_replayed_rounds_have_the_same_shapes(captures, reads):
    """Whatever was accepted before, and however few tokens are wanted."""
    model = gpt(block_size=64)
    draft = Draft(perturbed(model, 0.02), 3)
    decode(model, draft, [5, 2], 30, cuda_graph=True)
    shapes = [shape for _, shape in reads]
    assert 0.2 < draft.acceptance_rate < 0.9
    assert shapes[:2] == [(2, 4)] * 2  # the prompts
    rows, counts = zip(*shapes[2:], strict=True)
    assert counts == (2, 1, 1, 4) * (len(counts) // 4)
    assert all(len(set(rows[first : first + 4])) == 1 for first in range(0, len(rows), 4))
    assert captures


@ALL_DRAFTS
@pytest.mark.parametrize("count", [1, 3])
def test_idle_sequences_stay_within_the_window(captures, make, count):
    model = gpt(block_size=12)
    assert_as_plain(model, Draft(make(model), count), [1, 2, 7, 3, 8], 14, cuda_graph=True)
    assert captures


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_finished_sequences_leave_the_batch(captures, reads, cuda_graph):
    """With a graph when half of the sequences are finished: the batch size then needs another capture."""
    model, lengths, new = gpt(block_size=64), [1, 2, 3, 1, 2, 3], 30
    expected = tokens_of(list(decode_n_tokens(model, request(lengths, new))), 6)
    captures.clear()
    reads.clear()
    last = {0: 1, 3: 6, 4: 14, 1: 19}  # index of each row's last token
    given: dict[int, list[int]] = {row: [] for row in range(6)}
    asked = request(
        lengths, new, cuda_graph=cuda_graph, is_finished=lambda row, token: len(given[row]) - 1 == last.get(row)
    )
    for step in speculative_decode(model, Draft(perturbed(model, 0.02), 3), asked):
        for row, token in zip(step.rows, step.tokens, strict=True):
            given[row].append(token)
    for row in range(6):
        assert given[row] == expected[row][: last.get(row, new - 1) + 1]
    sizes = {shape[0] for _, shape in reads}
    if cuda_graph:
        assert sizes >= {6, 3}
        assert not {4, 5} & sizes
        assert len(captures) >= 2
    else:
        assert sizes >= {5, 4, 3, 2}
        assert not captures


def test_a_batch_takes_as_many_calls_as_one_sequence(reads):
    model = gpt(block_size=64)
    decode(model, Draft(gpt(block_size=64), 3), [4, 4, 4], 8, cuda_graph=False)
    address = model.transformer.wte.weight.data_ptr()
    assert [shape for where, shape in reads if where == address] == [(3, 3), (3, 4), (3, 4)]
