"""Rounds from a graph: each finds what it reads and writes where it was, and what comes out is the same."""

from __future__ import annotations

import functools

import pytest
import torch

from gptfast import GPT
from gptfast.generation import speculative
from gptfast.generation.autoregressive import steps
from gptfast.generation.rounds import Rounds
from gptfast.generation.sampling import Sampling
from gptfast.generation.speculative import Draft
from tests.support.drafts import DRAFTS, GREEDY, assert_as_plain, generator, gpt, merged, perturbed, ragged
from tests.support.graphs import stand_in

EVERYTHING = Sampling(
    temperature=0.9, top_k=15, top_p=0.95, repetition_penalty=1.2, frequency_penalty=0.3, no_repeat_ngram_size=3
)


@pytest.fixture
def captures(monkeypatch) -> list[torch.Generator | None]:
    """The generator of each capture."""
    monkeypatch.setattr(speculative, "Rounds", functools.partial(Rounds, graph=True))
    return stand_in(monkeypatch)


def plainly(monkeypatch) -> None:
    monkeypatch.setattr(speculative, "Rounds", functools.partial(Rounds, graph=False))


@pytest.mark.parametrize(
    ("backend", "lengths", "new"),
    [("eager", [5], 16), ("eager", [1], 16), ("eager", [1, 7, 4], 16), ("triton", [1, 3], 10)], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("make", DRAFTS.values(), ids=DRAFTS)
def test_replayed_rounds_are_the_plain_loop(captures, make, lengths, new, backend):
    small = {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 24, "backend": backend}
    model = gpt(**small)
    draft = Draft(make(model) if make is not DRAFTS["another"] else gpt(1, **small), 3)
    idx = ragged(*lengths)
    found = merged(speculative.steps(model, draft, idx, lengths, new, GREEDY), len(lengths))
    expected = merged(steps(gpt(**small | {"backend": "eager"}), idx, lengths, new, GREEDY), len(lengths))
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert captures


@pytest.mark.parametrize("settings", [GREEDY, Sampling(), EVERYTHING], ids=["greedy", "sampled", "everything"])
@pytest.mark.parametrize("lengths", [[4], [2, 2], [1, 6, 3]], ids=str)
def test_rounds_are_the_same_from_a_graph(captures, monkeypatch, lengths, settings):
    """Random numbers too, and the draft's counters, up to rounds in which less is proposed where there is no graph."""
    model, idx, own = gpt(block_size=64), ragged(*lengths), generator()
    drafts = [Draft(perturbed(model), 3) for _ in range(2)]

    def written(draft: Draft, random: torch.Generator) -> list:
        begun = speculative.steps(model, draft, idx, lengths, 40, settings, generator=random)
        return [next(begun) for _ in range(20)]

    found = written(drafts[0], own)
    assert captures == [own]
    plainly(monkeypatch)
    for step, plain in zip(found, written(drafts[1], generator()), strict=True):
        assert step[:2] == plain[:2]
        assert step.log_probs == pytest.approx(plain.log_probs, abs=1e-4)
    assert (drafts[0].proposed, drafts[0].accepted) == (drafts[1].proposed, drafts[1].accepted)
    assert len(captures) == 1


@pytest.mark.parametrize("new", range(1, 14))
def test_what_nobody_wants_is_not_counted(captures, monkeypatch, new):
    """A graph proposes as many as ever in the last rounds, too; nothing of that is seen."""
    model, lengths = gpt(block_size=32), [3, 5]
    found, counters = [], []
    for _ in range(2):
        draft = Draft(perturbed(model, 0.02), 4)
        found.append(merged(speculative.steps(model, draft, ragged(*lengths), lengths, new, GREEDY), 2))
        counters.append((draft.proposed, draft.accepted))
        plainly(monkeypatch)
    assert [tokens for tokens, _ in found[0]] == [tokens for tokens, _ in found[1]]
    assert [len(tokens) for tokens, _ in found[0]] == [new, new]
    assert counters[0] == counters[1]


def test_all_rounds_have_the_same_shapes(captures, monkeypatch):
    """Whatever was accepted in the one before, and however few tokens are wanted at the end."""
    model = gpt(block_size=64)
    draft = Draft(perturbed(model, 0.02), 3)
    shapes: list[tuple[int, ...]] = []
    forward = type(model.transformer).forward
    monkeypatch.setattr(
        type(model.transformer),
        "forward",
        lambda self, idx, *rest: shapes.append(tuple(idx.shape)) or forward(self, idx, *rest),
    )
    list(speculative.steps(model, draft, ragged(5, 2), [5, 2], 30, GREEDY))
    assert 0.2 < draft.acceptance_rate < 0.9
    assert shapes[:2] == [(2, 4)] * 2  # the prompts
    rows, read = zip(*shapes[2:], strict=True)
    assert read == (2, 1, 1, 4) * (len(read) // 4)
    assert all(len(set(rows[first : first + 4])) == 1 for first in range(0, len(rows), 4))
    assert captures


def test_the_window_ends_also_for_sequences_that_have_left(captures):
    """Those that stay in the batch begin anew with one token, again and again, and never leave the window."""
    model, lengths = gpt(block_size=12), [1, 2, 7, 3, 8]
    for name, make in DRAFTS.items():
        for count in (1, 3):
            assert_as_plain(model, Draft(make(model), count), ragged(*lengths), lengths, 14, GREEDY)
        assert captures, name


@pytest.mark.parametrize("graph", [True, False])
def test_sequences_leave_when_they_have_ended(captures, monkeypatch, graph):
    """With a graph when half of them have: then it is captured anew."""
    if not graph:
        plainly(monkeypatch)
    model, lengths, new = gpt(block_size=64), [1, 2, 3, 1, 2, 3], 30
    draft, sizes = Draft(perturbed(model, 0.02), 3), []
    expected = merged(steps(model, ragged(*lengths), lengths, new, GREEDY), 6)
    captures.clear()
    kept = Rounds.keep
    monkeypatch.setattr(Rounds, "keep", lambda self, places: (kept(self, places), sizes.append(len(self.tokens)))[0])
    wanted = {0: 1, 3: 6, 4: 14, 1: 19}  # the last token of sequences
    given: dict[int, list[int]] = {row: [] for row in range(6)}

    def ends(row: int, token: int) -> bool:
        return len(given[row]) - 1 == wanted.get(row)

    for step in speculative.steps(model, draft, ragged(*lengths), lengths, new, GREEDY, ends):
        for row, token in zip(step.rows, step.tokens, strict=True):
            given[row].append(token)
    for row in range(6):
        assert given[row] == expected[row][0][: wanted.get(row, new - 1) + 1]
    if graph:
        assert set(sizes) >= {6, 3}
        assert not {4, 5} & set(sizes)
        assert len(captures) >= 2
    else:
        assert set(sizes) >= {5, 4, 3, 2}
        assert not captures


def test_a_batch_is_read_together(monkeypatch):
    """Prompts and rounds of all sequences take as many calls as those of one."""
    called: list[tuple[int, ...]] = []
    plainly(monkeypatch)
    model: GPT = gpt(block_size=64)
    model.transformer.register_forward_hook(lambda module, given, _: called.append(tuple(given[0].shape)))
    list(speculative.steps(model, Draft(gpt(block_size=64), 3), ragged(4, 4, 4), [4] * 3, 8, GREEDY))
    assert called == [(3, 3), (3, 4), (3, 4)]


@torch.no_grad()
def test_a_kept_sequence_goes_on_where_it_was():
    model, other = gpt(block_size=64), perturbed(gpt(block_size=64), 0.02)
    idx, lengths = ragged(3, 6, 4), [3, 6, 4]
    whole, part = (Rounds(model, other, idx, lengths, 3, 30, GREEDY, None, False, graph=False) for _ in range(2))
    whole.next(30)
    part.next(30)
    assert part.keep([0, 1, 2]) == [0, 1, 2]
    assert part.keep([2, 0]) == [0, 1]
    for _ in range(3):
        told, expected = part.next(30), whole.next(30)
        for place, before in enumerate((2, 0)):
            accepted = expected.accepted[before]
            assert told.accepted[place] == accepted
            assert told.tokens[place][: accepted + 1] == expected.tokens[before][: accepted + 1]
