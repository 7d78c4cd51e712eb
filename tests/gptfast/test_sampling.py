import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import assume, currently_in_test_context, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.generation import logits_process as hugging_face

from gptfast import sampling
from gptfast.sampling import Sampling, draw, filtered
from oracle import DEVICE

INF = math.inf
NAN = math.nan
EVERYTHING = Sampling(
    temperature=0.8,
    top_k=40,
    top_p=0.9,
    min_p=0.02,
    typical_p=0.8,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.2,
    no_repeat_ngram_size=2,
)


def random_logits(*shape: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE)


def on_device(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, device=DEVICE)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def kept(logits: torch.Tensor) -> np.ndarray:
    assert not logits.isnan().any()
    return (logits > -INF).cpu().numpy()


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, "temperature must be at least 0 and finite, got -0.5"),
        ({"temperature": NAN}, "temperature must be at least 0 and finite, got nan"),
        ({"temperature": INF}, "temperature must be at least 0 and finite, got inf"),
        ({"temperature": True}, "temperature must be at least 0 and finite, got True"),
        ({"temperature": "hot"}, "temperature must be at least 0 and finite, got 'hot'"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_k": True}, "top_k must be an integer, got True"),
        ({"top_k": 2.0}, "top_k must be an integer, got 2.0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"top_p": NAN}, "top_p must be above 0 and at most 1, got nan"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\], got -0.1"),
        ({"min_p": 1.1}, r"min_p must be in \[0, 1\], got 1.1"),
        ({"min_p": False}, r"min_p must be in \[0, 1\], got False"),
        ({"typical_p": 0}, "typical_p must be above 0 and at most 1, got 0"),
        ({"typical_p": NAN}, "typical_p must be above 0 and at most 1, got nan"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be in \[0.01, 100\], got 0.0"),
        ({"repetition_penalty": NAN}, r"repetition_penalty must be in \[0.01, 100\], got nan"),
        ({"presence_penalty": -INF}, r"presence_penalty must be in \[-100, 100\], got -inf"),
        ({"frequency_penalty": NAN}, r"frequency_penalty must be in \[-100, 100\], got nan"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be at least 0, got -1"),
        ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size must be an integer, got 1.5"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Sampling(**settings)


def test_the_ends_of_the_ranges_are_accepted():
    Sampling(temperature=0, top_k=1, top_p=1, min_p=0, typical_p=1, repetition_penalty=100, presence_penalty=-100)
    Sampling(5e-324, top_k=np.int64(3), top_p=5e-324, min_p=np.float32(1), typical_p=5e-324, frequency_penalty=100)
    assert len({Sampling(), Sampling(), EVERYTHING}) == 2
    with pytest.raises(FrozenInstanceError):
        Sampling().top_k = 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: sampling.keep_top_k(x, 0), "top_k must be at least 1, got 0"),
        (lambda x: sampling.keep_top_p(x, 0.0), "top_p must be above 0 and at most 1, got 0.0"),
        (lambda x: sampling.keep_min_p(x, NAN), r"min_p must be in \[0, 1\], got nan"),
        (lambda x: sampling.keep_typical(x, 2.0), "typical_p must be above 0 and at most 1, got 2.0"),
        (lambda x: sampling.block_ngrams(x, x.long(), x[:, 0].long(), 0), "size must be at least 1, got 0"),
        (lambda x: filtered(x[0], Sampling()), r"logits must be \[B, V\] with V >= 1, got shape \(5,\)"),
        (lambda x: draw(x[:, :0], Sampling(0.0)), r"logits must be \[B, V\] with V >= 1, got shape \(2, 0\)"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 5))


# ---- filters, against NumPy


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def numpy_top_k(logits: np.ndarray, k: int) -> np.ndarray:
    return logits >= np.sort(logits)[-min(k, len(logits))]


def decided(far_enough: bool) -> None:
    """Take another example where rounding decides."""
    if currently_in_test_context():
        assume(far_enough)


def numpy_min_p(logits: np.ndarray, p: float) -> np.ndarray:
    probabilities = softmax(logits)
    decided(np.abs(probabilities / probabilities.max() - p)[probabilities < probabilities.max()].min(initial=1) > 1e-5)
    return probabilities >= p * probabilities.max()


def numpy_top_p(logits: np.ndarray, p: float) -> np.ndarray:
    return numpy_first(softmax(logits), np.argsort(-logits, kind="stable"), p)


def numpy_typical(logits: np.ndarray, p: float) -> np.ndarray:
    probabilities = softmax(logits)
    information = np.full_like(logits, INF)
    information[probabilities > 0] = -np.log(probabilities[probabilities > 0])
    entropy = (probabilities * np.where(probabilities > 0, information, 0)).sum()
    distance = np.abs(information - entropy)
    for one in np.unique(logits[probabilities > 0]):  # two logits on both sides of the entropy: rounding orders them
        others = distance[(logits != one) & (probabilities > 0)]
        decided(np.abs(others - distance[logits == one][0]).min(initial=1) > 1e-4)
    return numpy_first(probabilities, np.argsort(distance, kind="stable"), p)


def numpy_first(probabilities: np.ndarray, order: np.ndarray, p: float) -> np.ndarray:
    """As few as possible of those in `order`, such that they add up to p."""
    chosen = np.zeros(len(order), dtype=bool)
    total = 0.0
    for index in order:
        chosen[index] = True
        total += probabilities[index]
        decided(abs(total - p) > 1e-5)
        if total >= p:
            break
    return chosen


FILTERS = {
    "top_k": (sampling.keep_top_k, numpy_top_k, st.integers(1, 15)),
    "top_p": (sampling.keep_top_p, numpy_top_p, st.floats(0, 0.9999, exclude_min=True)),
    "min_p": (sampling.keep_min_p, numpy_min_p, st.floats(0, 1)),
    "typical": (sampling.keep_typical, numpy_typical, st.floats(0, 0.9999, exclude_min=True)),
}
LOGIT = st.one_of(st.floats(-30, 30, width=32), st.integers(-2, 2).map(float), st.just(-INF))


@pytest.mark.parametrize("name", FILTERS)
@given(data=st.data())
def test_filters_keep_what_numpy_keeps(name, data):
    keep, reference, values = FILTERS[name]
    width = data.draw(st.integers(1, 12))
    rows = data.draw(st.lists(st.lists(LOGIT, min_size=width, max_size=width), min_size=1, max_size=3))
    assume(all(max(row) > -INF for row in rows))
    value = data.draw(values)
    result = keep(on_device(rows), value)
    for row, before, after in zip(kept(result), rows, result.tolist(), strict=True):
        expected = reference(np.asarray(before), value) & (np.asarray(before) > -INF)
        assert row.tolist() == expected.tolist()
        assert row.any()
        assert np.array_equal(np.asarray(after)[row], np.asarray(before)[row])  # what is kept keeps its logit


@pytest.mark.parametrize("smallest", [5e-324, 1e-45, 1e-12])
def test_the_smallest_shares_keep_one_token(smallest):
    rows = on_device([[0.0, 0.0, 0.0, 0.0], [1.0, 3.0, 2.0, -INF], [-INF, -INF, -7.0, -INF], [-INF, 5.0, 5.0, -200.0]])
    assert kept(sampling.keep_top_p(rows, smallest)).nonzero()[1].tolist() == [0, 1, 2, 1]
    typical = kept(sampling.keep_typical(rows, smallest))
    assert typical.sum(-1).tolist() == [1, 1, 1, 1]
    assert typical.nonzero()[1].tolist() == [0, 1, 2, 1]


def test_shares_of_one_keep_all():
    rows = random_logits(8, 100)
    for keep in (sampling.keep_top_p, sampling.keep_typical):
        dropped = rows.softmax(-1).masked_fill(keep(rows, 1.0) > -INF, 0.0).sum(-1)
        assert dropped.max() < 1e-5  # what rounding of the sum may cost
    assert torch.equal(sampling.keep_min_p(rows, 0.0), rows)
    assert torch.equal(sampling.keep_top_k(rows, 1000), rows)


def test_ties():
    rows = on_device([[1.0, 2.0, 2.0, 0.0, 2.0]])
    assert kept(sampling.keep_top_k(rows, 2)).tolist() == [[False, True, True, False, True]]
    assert kept(sampling.keep_min_p(rows, 1.0)).tolist() == [[False, True, True, False, True]]
    assert kept(sampling.keep_top_p(rows, 0.5)).tolist() == [[False, True, True, False, False]]
    for keep in (sampling.keep_top_p, sampling.keep_typical):
        for width in (64, 2**12, 2**16):
            equal = kept(keep(torch.zeros(3, width, device=DEVICE), 0.25))
            assert equal.sum(-1).tolist() == equal[:, : width // 4].sum(-1).tolist() == [width // 4] * 3


def test_min_p_of_probabilities_too_small_for_float32():
    rows = on_device([[0.0, -110.0, -120.0]])
    assert kept(sampling.keep_min_p(rows, 1e-50)).tolist() == [[True, True, False]]


def test_the_likeliest_token_may_be_untypical():
    rows = on_device([[0.35, *[0.065] * 10]]).log()
    assert not kept(sampling.keep_typical(rows, 0.2))[0, 0]
    # temperature 0 comes before the filters, and leaves them no choice
    assert draw(rows, Sampling(temperature=0.0, typical_p=0.2)).tolist() == [0]


# ---- filters and penalties, against Hugging Face


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        *((lambda x, k=k: sampling.keep_top_k(x, k), hugging_face.TopKLogitsWarper(k)) for k in (1, 7, 300, 5000)),
        *((lambda x, p=p: sampling.keep_top_p(x, p), hugging_face.TopPLogitsWarper(p)) for p in (0.01, 0.5, 0.95)),
        *((lambda x, p=p: sampling.keep_min_p(x, p), hugging_face.MinPLogitsWarper(p)) for p in (0.0, 0.01, 0.3, 1.0)),
        *((lambda x, p=p: sampling.keep_typical(x, p), hugging_face.TypicalLogitsWarper(p)) for p in (0.02, 0.5, 0.95)),
    ],
)
def test_filters_keep_what_hugging_face_keeps(ours, theirs):
    for scale in (0.5, 3.0):
        logits = random_logits(32, 1000, scale=scale)
        logits[::2, ::3] = -INF
        assert torch.equal(ours(logits), theirs(None, logits.clone()))


def test_the_order_of_the_filters_is_that_of_hugging_face():
    chosen = Sampling(temperature=1.7, top_k=60, top_p=0.8, min_p=0.04, typical_p=0.7)
    logits = random_logits(64, 1000)
    warpers = [
        hugging_face.TemperatureLogitsWarper(1.7),
        hugging_face.TopKLogitsWarper(60),
        hugging_face.TopPLogitsWarper(0.8),
        hugging_face.MinPLogitsWarper(0.04),
        hugging_face.TypicalLogitsWarper(0.7),
    ]
    expected = hugging_face.LogitsProcessorList(warpers)(None, logits)
    result = filtered(logits, chosen)
    assert np.array_equal(kept(result), kept(expected))
    torch.testing.assert_close(result.softmax(-1), expected.softmax(-1))
    # and the order matters: with two neighbours exchanged, other tokens are kept; top-k and temperature alone commute
    for first in (1, 2, 3):
        exchanged = [*warpers]
        exchanged[first : first + 2] = warpers[first + 1], warpers[first]
        assert not np.array_equal(kept(hugging_face.LogitsProcessorList(exchanged)(None, logits)), kept(expected))
    late = hugging_face.LogitsProcessorList([*warpers[1:], warpers[0]])(None, logits)
    assert not np.array_equal(kept(late), kept(expected))


def ragged(vocabulary: int, width: int = 24, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequences with rubbish for padding, their lengths, and those of their prompts."""
    random = np.random.default_rng(seed)
    lengths = np.array([width, width - 5, 7, 3, 2, 1, 0, width])
    sequences = random.integers(vocabulary, size=(len(lengths), width))
    for row, length in enumerate(lengths):
        sequences[row, length:] = random.choice([-100, 0, 1, vocabulary, 2**40], size=width - length)
    prompts = np.minimum(lengths, [5, 0, 7, 1, 2, 0, 0, width - 1])
    return tuple(torch.from_numpy(part).to(DEVICE) for part in (sequences, lengths, prompts))


@pytest.mark.parametrize(
    "chosen",
    [
        Sampling(repetition_penalty=1.5),
        Sampling(repetition_penalty=0.5),
        Sampling(presence_penalty=0.7),
        Sampling(frequency_penalty=0.3),
        Sampling(frequency_penalty=-0.3, presence_penalty=-1.0),
        Sampling(repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.7),
    ],
)
def test_penalties_against_numpy(chosen):
    sequences, lengths, prompts = ragged(vocabulary=9)
    logits = random_logits(len(lengths), 9)
    logits[:, 4] = -INF
    expected = logits.double().cpu().numpy()
    for row, (sequence, length, prompt) in enumerate(zip(sequences.tolist(), lengths, prompts, strict=True)):
        for token in set(sequence[:length]):
            below_0 = expected[row, token] < 0
            expected[row, token] *= chosen.repetition_penalty if below_0 else 1 / chosen.repetition_penalty
        for token in sequence[prompt:length]:
            expected[row, token] -= chosen.frequency_penalty
        for token in set(sequence[prompt:length]):
            expected[row, token] -= chosen.presence_penalty
    result = sampling.penalize(logits, sequences, lengths, prompts, chosen)
    np.testing.assert_allclose(result.cpu().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert result.dtype == torch.float32
    assert torch.isfinite(result).any(-1).all()


def test_no_penalty_changes_nothing():
    sequences, lengths, prompts = ragged(vocabulary=9)
    logits = random_logits(len(lengths), 9)
    assert torch.equal(sampling.penalize(logits, sequences, lengths, prompts, Sampling(top_k=3)), logits)
    empty = sequences[:, :0]
    assert torch.equal(sampling.penalize(logits, empty, lengths * 0, prompts * 0, EVERYTHING), logits)
    assert torch.equal(sampling.block_ngrams(logits, empty, lengths * 0, 1), logits)


def test_the_repetition_penalty_is_hugging_faces():
    sequences, lengths, prompts = ragged(vocabulary=50)
    logits = random_logits(len(lengths), 50)
    result = sampling.penalize(logits, sequences, lengths, prompts, Sampling(repetition_penalty=1.7))
    processor = hugging_face.RepetitionPenaltyLogitsProcessor(1.7)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(result[row], processor(sequences[row : row + 1, :length], logits[row : row + 1].clone())[0])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 30])
@pytest.mark.parametrize("vocabulary", [3, 30])
def test_blocked_ngrams_are_hugging_faces(size, vocabulary):
    sequences, lengths, _ = ragged(vocabulary)
    logits = random_logits(len(lengths), vocabulary)
    result = sampling.block_ngrams(logits, sequences, lengths, size)
    processor = hugging_face.NoRepeatNGramLogitsProcessor(size)
    blocked = 0
    for row, length in enumerate(lengths.tolist()):
        expected = processor(sequences[row : row + 1, :length], logits[row : row + 1].clone())[0]
        if (expected == -INF).all():  # Hugging Face leaves nothing to draw
            expected = logits[row]
        assert torch.equal(result[row], expected)
        blocked += int((expected == -INF).sum())
    assert blocked > 0 or (size, vocabulary) in ((30, 3), (30, 30), (3, 30), (4, 30))


def test_every_window_blocks_its_own_continuation():
    sequences = torch.tensor([[1, 2, 3, 1, 2, 4, 0, 1, 2, 9, 9, 9]], device=DEVICE)
    blocked = sampling.block_ngrams(torch.zeros(1, 6, device=DEVICE), sequences, torch.tensor([9], device=DEVICE), 3)
    assert (blocked == -INF).nonzero()[:, 1].tolist() == [3, 4]


def test_blocking_every_token_blocks_none():
    sequences = torch.tensor([[0, 1, 2], [0, 0, 1]], device=DEVICE)
    logits = on_device([[0.5, 1.0, -INF], [0.5, 1.0, -INF]])
    result = sampling.block_ngrams(logits, sequences, torch.tensor([3, 1], device=DEVICE), 1)
    assert result.tolist() == [[0.5, 1.0, -INF], [-INF, 1.0, -INF]]


# ---- the draw


@pytest.mark.parametrize(
    "chosen",
    [
        Sampling(),
        Sampling(temperature=0.6),
        Sampling(temperature=1.5, top_k=3),
        Sampling(top_p=0.9),
        Sampling(temperature=2.0, min_p=0.3),
        Sampling(typical_p=0.5),
        Sampling(temperature=1.3, top_k=6, top_p=0.95, min_p=0.05),
    ],
)
def test_frequencies(chosen):
    """Chi-square of 20,000 draws against probabilities in float64."""
    logits = on_device([[2.0, 1.0, -INF, 0.0, -1.0, -2.0, 0.5, -4.0]])
    tempered = logits[0].double().cpu().numpy() / chosen.temperature
    for value, reference in (
        (chosen.top_k, numpy_top_k),
        (chosen.top_p, numpy_top_p),
        (chosen.min_p, numpy_min_p),
        (chosen.typical_p, numpy_typical),
    ):
        if value is not None:
            tempered[~reference(tempered, value)] = -INF
    expected = 20_000 * softmax(tempered)
    drawn = draw(logits.expand(20_000, -1), chosen, generator())
    assert drawn.shape == (20_000,)
    assert drawn.dtype == torch.int64
    counts = torch.bincount(drawn, minlength=8).cpu().numpy()
    assert not counts[expected == 0].any()
    some = expected > 0
    # the 99.99% quantile, as Wilson and Hilferty approximate it
    freedom = some.sum() - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    assert ((counts - expected)[some] ** 2 / expected[some]).sum() < limit


def test_rows_are_drawn_independently():
    drawn = draw(torch.zeros(20_000, 2, device=DEVICE), Sampling(), generator())
    pairs = torch.bincount(drawn[::2] * 2 + drawn[1::2], minlength=4).double()
    assert ((pairs - 2500) ** 2 / 2500).sum() < 21.1  # the 99.99% quantile of chi-square with 3 degrees of freedom


def test_a_generator_makes_draws_repeatable():
    logits = random_logits(64, 100)
    first = draw(logits, EVERYTHING, generator())
    assert torch.equal(first, draw(logits, EVERYTHING, generator()))
    assert not torch.equal(first, draw(logits, EVERYTHING, generator(1)))
    used = generator()
    assert not torch.equal(draw(logits, EVERYTHING, used), draw(logits, EVERYTHING, used))


def test_greedy_takes_the_likeliest_token_and_of_equal_ones_the_first():
    logits = random_logits(64, 100)
    for chosen in (Sampling(temperature=0.0), Sampling(0, top_k=3, top_p=0.5, min_p=0.1, typical_p=0.1)):
        assert torch.equal(draw(logits, chosen), logits.argmax(-1))
        assert kept(filtered(logits, chosen)).nonzero()[1].tolist() == logits.argmax(-1).tolist()
        assert draw(on_device([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]]), chosen).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 5e-324])
@pytest.mark.parametrize("others", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"typical_p": 0.5}])
def test_the_smallest_temperatures_are_greedy(temperature, others):
    logits = random_logits(64, 100, scale=30.0)
    logits[:, 3] = -INF
    assert torch.equal(draw(logits, Sampling(temperature, **others)), logits.argmax(-1))
    # but draw among equals
    drawn = draw(on_device([[3e38, -3e38, 3e38, -INF]]).expand(100, -1), Sampling(temperature), generator())
    assert set(drawn.tolist()) == {0, 2}


@pytest.mark.parametrize("temperature", [1e30, 1e40, 1.7e308])
def test_the_largest_temperatures_are_uniform(temperature):
    logits = filtered(on_device([[5.0, -5.0, -INF, 0.0]]), Sampling(temperature))
    assert logits.tolist() == [[0.0, pytest.approx(0.0, abs=1e-6), -INF, pytest.approx(0.0, abs=1e-6)]]


@given(
    rows=st.integers(1, 6).flatmap(
        lambda width: st.lists(
            st.lists(
                st.one_of(st.floats(-3e38, 3e38).map(np.float32).map(float), st.just(-INF), st.integers(-1, 1)),
                min_size=width,
                max_size=width,
            ),
            min_size=1,
            max_size=4,
        )
    ),
    chosen=st.builds(
        Sampling,
        temperature=st.floats(0, allow_infinity=False),
        top_k=st.none() | st.integers(1, 8),
        top_p=st.none() | st.floats(0, 1, exclude_min=True),
        min_p=st.none() | st.floats(0, 1),
        typical_p=st.none() | st.floats(0, 1, exclude_min=True),
    ),
)
def test_whatever_the_settings_a_token_remains_and_is_drawn(rows, chosen):
    assume(all(max(row) > -INF for row in rows))
    logits = torch.tensor(rows, dtype=torch.float32, device=DEVICE)
    result = filtered(logits, chosen)
    assert not result.isnan().any()
    assert (result.amax(-1) <= 0.0).all()
    assert result.isfinite().any(-1).all()
    assert not kept(result)[~kept(logits)].any()
    sampling.check(result)
    drawn = draw(logits, chosen, generator())
    assert result.gather(1, drawn[:, None]).isfinite().all()


def test_a_time_of_zero_draws_no_excluded_token(monkeypatch):
    """Some devices' exponential_ returns 0."""
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator=None: self.zero_())
    logits = on_device([[-INF, 2.0, 1.0, -INF], [-INF, -INF, -INF, 0.0]])
    times = sampling.exponentials(logits)
    assert (times > 0.0).all()
    assert times.dtype == torch.float32
    assert (1.0 / times).isfinite().all()
    assert draw(logits, Sampling()).tolist() == [1, 3]


def test_half_precision_is_filtered_in_single():
    logits = random_logits(16, 300)
    for dtype in (torch.bfloat16, torch.float16):
        result = filtered(logits.to(dtype), EVERYTHING)
        assert result.dtype == torch.float32
        assert torch.equal(result, filtered(logits.to(dtype).float(), EVERYTHING))


def test_nothing_given_is_changed():
    sequences, lengths, prompts = ragged(vocabulary=100)
    logits = random_logits(len(lengths), 100)
    before = [tensor.clone() for tensor in (logits, sequences, lengths, prompts)]
    everything(logits, sequences, lengths, prompts, EVERYTHING)
    assert all(map(torch.equal, before, (logits, sequences, lengths, prompts)))


# ---- rows that cannot be drawn of


@pytest.mark.parametrize(
    ("row", "found"),
    [([NAN, 0.0, 1.0], "NaN"), ([NAN] * 3, "NaN"), ([0.0, INF, -INF], "inf"), ([-INF] * 3, "-inf alone")],
)
def test_rows_that_cannot_be_drawn_of_are_found(row, found):
    logits = on_device([[0.0, 1.0, 2.0], [-INF, 0.0, -INF], row, [NAN] * 3])
    sampling.check(logits[:2])
    with pytest.raises(ValueError, match=f"^row 2 of the logits has {found}; accepted: finite logits, at least one,"):
        sampling.check(logits)
    for chosen in (Sampling(), Sampling(0.0), Sampling(5e-324), Sampling(top_k=1), Sampling(0.7, 2, 0.5, 0.1, 0.3)):
        with pytest.raises(ValueError, match="row 2 of the logits has"):
            sampling.check(filtered(logits, chosen))
        drawn = draw(logits, chosen, generator())  # it cannot raise, and what it returns can still be looked up
        assert 0 <= drawn.min() <= drawn.max() < 3


# ---- no waiting for the device


def everything(logits, sequences, lengths, prompts, chosen):
    logits = sampling.penalize(logits, sequences, lengths, prompts, chosen)
    if chosen.no_repeat_ngram_size:
        logits = sampling.block_ngrams(logits, sequences, lengths, chosen.no_repeat_ngram_size)
    return draw(logits, chosen)


def test_compiled_as_one_graph():
    torch._dynamo.reset()
    sequences, lengths, prompts = ragged(vocabulary=100)
    logits = random_logits(len(lengths), 100)
    filters = torch.compile(filtered, fullgraph=True, backend="aot_eager")
    whole = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for chosen in (EVERYTHING, Sampling(temperature=0.0), Sampling(0.5, top_k=7), Sampling(0.6, top_k=9, top_p=0.7)):
        assert torch.equal(filters(logits, chosen), filtered(logits, chosen))
        torch.manual_seed(0)
        expected = everything(logits, sequences, lengths, prompts, chosen)
        torch.manual_seed(0)
        assert torch.equal(whole(logits, sequences, lengths, prompts, chosen), expected)
    # with a generator, the exponentials are drawn outside
    race = torch.compile(sampling.exponential_race, fullgraph=True, backend="aot_eager")
    times = sampling.exponentials(logits, generator())
    assert torch.equal(race(filtered(logits, EVERYTHING), times), draw(logits, EVERYTHING, generator()))


@pytest.mark.parametrize("chosen", [EVERYTHING, Sampling(), Sampling(temperature=0.0)])
def test_no_value_is_needed_to_go_on(chosen):
    """On tensors without values: what asks for one, or for a shape that depends on one, raises."""
    shapes = {"logits": (3, 50), "sequences": (3, 12), "lengths": (3,), "prompts": (3,)}
    given = {
        name: torch.empty(shape, dtype=torch.float32 if name == "logits" else torch.int64, device="meta")
        for name, shape in shapes.items()
    }
    assert everything(**given, chosen=chosen).shape == (3,)
    with pytest.raises((RuntimeError, NotImplementedError)):
        sampling.check(given["logits"])
    with FakeTensorMode():
        fake = {name: torch.zeros(tensor.shape, dtype=tensor.dtype, device=DEVICE) for name, tensor in given.items()}
        assert everything(**fake, chosen=chosen).shape == (3,)
        with pytest.raises(RuntimeError):
            sampling.check(fake["logits"])


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_captured_in_a_cuda_graph():
    sequences, lengths, prompts = ragged(vocabulary=5000)
    logits = random_logits(len(lengths), 5000)
    everything(logits, sequences, lengths, prompts, EVERYTHING)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = everything(logits, sequences, lengths, prompts, EVERYTHING)
    results = []
    for _ in range(2):
        graph.replay()
        results.append(drawn.clone())
    assert 0 <= drawn.min() <= drawn.max() < 5000
    assert not torch.equal(*results)
