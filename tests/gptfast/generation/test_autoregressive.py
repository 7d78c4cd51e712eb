"""Compiled steps, steps from CUDA graphs and steps ahead of the host give the same tokens."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from gptfast import GPT, Sampling
from gptfast.generation.autoregressive import Step, decode_n_tokens
from tests.support.generation import GREEDY, generator, gpt, request
from tests.support.oracle import DEVICE

SAMPLED = Sampling(temperature=0.7, top_k=9, top_p=0.9, repetition_penalty=1.2, no_repeat_ngram_size=3)
SETTINGS = pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
LENGTHS = pytest.mark.parametrize("lengths", [[4], [3, 3], [1, 5, 9]], ids=str)


def decode(
    lengths: list[int], sampling: Sampling = GREEDY, new: int = 9, model: GPT | None = None, **options
) -> list[Step]:
    asked = request(lengths, new, sampling, **{"generator": generator()} | options)
    return list(decode_n_tokens(gpt(block_size=12) if model is None else model, asked))


def assert_same(found: list[Step], expected: list[Step]) -> None:
    assert [step[:2] for step in found] == [step[:2] for step in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


@SETTINGS
@LENGTHS
def test_running_ahead_of_the_host_changes_nothing(lengths, sampling):
    assert_same(decode(lengths, sampling, run_ahead=True), decode(lengths, sampling, run_ahead=False))


@pytest.mark.parametrize("lengths", [[3, 3, 3], [1, 5, 9]], ids=str)
def test_running_ahead_drops_finished_sequences(lengths):
    free, sizes = decode(lengths), set()
    for stop in {token for step in free for token in step.tokens}:
        is_finished = lambda row, token, stop=stop: token == stop  # noqa: E731
        found = decode(lengths, is_finished=is_finished, run_ahead=True)
        sizes |= {len(step.rows) for step in found}
        assert_same(found, decode(lengths, is_finished=is_finished, run_ahead=False))
    assert len(sizes) > 1


def test_the_device_runs_one_step_ahead(reads):
    for run_ahead, expected in ((True, [2, 3, 4, 4]), (False, [1, 2, 3, 4])):
        reads.clear()
        steps = decode_n_tokens(gpt(), request([2], 4, run_ahead=run_ahead, cuda_graph=False))
        assert [len(reads) for _ in steps] == expected


@SETTINGS
@LENGTHS
def test_a_compiled_step_is_one_graph(monkeypatch, lengths, sampling):
    """As traced, without generated code; past the window too."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    expected = decode(lengths, sampling)
    assert_same(decode(lengths, sampling, compiled=True), expected)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", *(["triton"] if DEVICE.type == "cuda" else [])])
def test_compiled_steps_give_the_same_tokens(backend):
    torch.compiler.reset()
    for lengths, sampling in (([4], GREEDY), ([1, 5, 9], SAMPLED)):
        expected = decode(lengths, sampling)
        assert_same(decode(lengths, sampling, model=gpt(backend=backend, block_size=12), compiled=True), expected)


def test_a_graph_draws_new_numbers_at_each_step(captures):
    own = generator()
    graphed = {"new": 6, "run_ahead": True, "cuda_graph": True}
    found = decode([1, 5], SAMPLED, generator=own, **graphed)
    assert captures == [own]
    assert len({tuple(step.tokens) for step in found}) > 3
    assert_same(found, decode([1, 5], SAMPLED, **graphed))


@pytest.mark.parametrize("run_ahead", [True, False])
def test_a_graph_is_recaptured_when_half_of_the_sequences_are_finished(captures, run_ahead):
    lengths, new = [1, 2, 3, 1, 2, 3], 9
    expected = decode(lengths, new=new)
    captures.clear()
    last = {0: 1, 3: 2, 4: 4, 1: 6}  # step of each row's last token
    seen = dict.fromkeys(range(6), -1)

    def is_finished(row: int, token: int) -> bool:
        seen[row] += 1
        return seen[row] == last.get(row)

    given: dict[int, list[int]] = {row: [] for row in range(6)}
    for step in decode(lengths, new=new, is_finished=is_finished, run_ahead=run_ahead, cuda_graph=True):
        for row, token in zip(step.rows, step.tokens, strict=True):
            given[row].append(token)
    for row in range(6):
        assert given[row] == [step.tokens[row] for step in expected][: last.get(row, new) + 1]
    assert len(captures) == 2  # for six sequences, and for three


def test_a_finished_sequence_is_dropped_before_it_fills_the_window(captures, reads):
    """It would make every step read all windows again."""
    decode([9, 1, 1], is_finished=lambda row, token: row == 0, run_ahead=False, cuda_graph=True)
    shapes = [shape for _, shape in reads]
    assert shapes[0] == (3, 9)
    assert all(length == 1 for _, length in shapes[1:])


@pytest.mark.parametrize("run_ahead", [True, False])
def test_logits_that_are_not_finite_are_refused(run_ahead):
    model = gpt()
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(ValueError, match="row 0 of the logits has NaN"):
        decode([3], new=5, model=model, run_ahead=run_ahead)
