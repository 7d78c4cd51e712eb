"""Tokens one by one: compiled, from graphs and ahead of the host, they are the same."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

import gptfast.generation.decoder
from gptfast import GPT, GPTConfig, Sampling
from gptfast.generation.autoregressive import Step, steps
from tests.support.graphs import stand_in
from tests.support.oracle import DEVICE

GREEDY = Sampling(temperature=0.0)
SAMPLED = Sampling(temperature=0.7, top_k=9, top_p=0.9, repetition_penalty=1.2, no_repeat_ngram_size=3)


def build(backend: str = "eager", **changes) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(block_size=12, vocab_size=23, n_layer=2, n_head=2, n_embd=32, init_std=0.3, **changes)
    return GPT(config, backend=backend).to(DEVICE).eval()


def prompts(lengths: list[int]) -> Tensor:
    return torch.randint(23, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def generator() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(0)


def taken(
    model: GPT, lengths: list[int], settings: Sampling, stops: tuple[int, ...] = (), count=9, **how
) -> list[Step]:
    ends = lambda row, token: token in stops  # noqa: E731
    return list(steps(model, prompts(lengths), lengths, count, settings, ends, generator(), **how))


def assert_same(found: list[Step], expected: list[Step]) -> None:
    assert [step[:2] for step in found] == [step[:2] for step in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("lengths", [[4], [3, 3], [1, 5, 9]], ids=str)
def test_steps_ahead_of_the_host_are_the_same(lengths, settings):
    assert_same(taken(build(), lengths, settings, ahead=True), taken(build(), lengths, settings, ahead=False))


@pytest.mark.parametrize("lengths", [[3, 3, 3], [1, 5, 9]], ids=str)
def test_sequences_that_end_leave_also_ahead_of_the_host(lengths):
    free = taken(build(), lengths, GREEDY)
    sizes = set()
    for stop in {token for step in free for token in step.tokens}:
        found = taken(build(), lengths, GREEDY, (stop,), ahead=True)
        sizes |= {len(step.rows) for step in found}
        assert_same(found, taken(build(), lengths, GREEDY, (stop,), ahead=False))
    assert len(sizes) > 1


def test_the_device_is_a_step_ahead_and_never_too_far(monkeypatch):
    model = build()
    read = []
    forward = type(model.transformer).forward
    monkeypatch.setattr(
        type(model.transformer), "forward", lambda self, *arguments: read.append(1) or forward(self, *arguments)
    )
    for ahead in (True, False):
        read.clear()
        counts = [len(read) for _ in steps(model, prompts([2]), [2], 4, GREEDY, ahead=ahead)]
        assert counts == ([2, 3, 4, 4] if ahead else [1, 2, 3, 4])


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("lengths", [[4], [3, 3], [1, 5, 9]], ids=str)
def test_a_step_is_one_graph_for_the_compiler(monkeypatch, lengths, settings):
    """As traced, without generated code; past the window too, which is read anew."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    expected = taken(build(), lengths, settings)
    assert_same(taken(build(), lengths, settings, compiled=True), expected)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", *(["triton"] if DEVICE.type == "cuda" else [])])
def test_compiled_steps(backend):
    torch.compiler.reset()
    for lengths, settings in (([4], GREEDY), ([1, 5, 9], SAMPLED)):
        expected = taken(build(), lengths, settings)
        assert_same(taken(build(backend), lengths, settings, compiled=True), expected)


@pytest.fixture
def captures(monkeypatch) -> list:
    """Steps from graphs: in form alone on machines without a GPU, where what is captured is called at each replay.

    It collects the generator of each capture.
    """
    if DEVICE.type != "cuda":
        graphed = functools.partial(gptfast.generation.decoder.CachedDecoder, graph=True)
        monkeypatch.setattr("gptfast.generation.autoregressive.CachedDecoder", graphed)
    return stand_in(monkeypatch)


def test_a_graph_draws_anew_at_each_step(captures):
    model, idx, own = build(), prompts([1, 5]), generator()
    found = list(steps(model, idx, [1, 5], 6, SAMPLED, generator=own, ahead=True))
    assert captures == [own]
    rows = torch.tensor([step.tokens for step in found])  # [6, 2]
    assert len(rows.unique(dim=0)) > 3
    assert_same(found, list(steps(model, idx, [1, 5], 6, SAMPLED, generator=generator(), ahead=True)))


@pytest.mark.parametrize("ahead", [True, False])
def test_a_graph_is_captured_anew_when_half_of_the_sequences_have_ended(captures, ahead):
    """Those that have ended before are drawn for, and not given out."""
    lengths, count = [1, 2, 3, 1, 2, 3], 9
    expected = taken(build(), lengths, GREEDY, count=count)
    captures.clear()
    end = {0: 1, 3: 2, 4: 4, 1: 6}  # the last step of sequences
    given: dict[int, list[int]] = {row: [] for row in range(6)}
    seen = dict.fromkeys(range(6), -1)

    def ends(row: int, token: int) -> bool:
        seen[row] += 1
        return seen[row] == end.get(row)

    for step in steps(build(), prompts(lengths), lengths, count, GREEDY, ends, ahead=ahead):
        for row, token in zip(step.rows, step.tokens, strict=True):
            given[row].append(token)
    for row in range(6):
        whole = [step.tokens[row] for step in expected]
        assert given[row] == whole[: end.get(row, count) + 1]
    assert len(captures) == 2  # of six, and of three


def test_sequences_that_have_ended_leave_before_they_fill_the_window(captures):
    """For them alone all would be read anew, at every step."""
    model, lengths = build(), [9, 1, 1]
    sizes = []
    forward = type(model.transformer).forward
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            type(model.transformer),
            "forward",
            lambda self, idx, *rest: sizes.append(tuple(idx.shape)) or forward(self, idx, *rest),
        )
        list(steps(model, prompts(lengths), lengths, 9, GREEDY, lambda row, token: row == 0, ahead=False))
    assert sizes[0] == (3, 9)
    assert all(length == 1 for _, length in sizes[1:])


@pytest.mark.parametrize("ahead", [True, False])
def test_logits_that_are_no_numbers(ahead):
    model = build()
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(ValueError, match="row 0 of the logits has NaN; accepted: finite logits"):
        list(steps(model, prompts([3]), [3], 5, GREEDY, ahead=ahead))
