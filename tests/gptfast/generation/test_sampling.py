"""Penalties, filters and draws against Hugging Face, numpy in float64 and their distributions."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.generation import logits_process as hugging_face

from gptfast.generation import sampling
from gptfast.generation.sampling import Sampling, exponential_noise, filter_logits, process_logits, require_finite
from tests.support.generation import generator
from tests.support.logits import (
    EVERYTHING,
    INF,
    NAN,
    assert_distributed,
    draw,
    kept,
    numpy_min_p,
    numpy_top_k,
    numpy_top_p,
    numpy_typical,
    on_device,
    ragged,
    random_logits,
    softmax,
)  # fmt: skip
from tests.support.oracle import DEVICE

# settings


@pytest.mark.parametrize(
    ("name", "values", "accepted"),
    [
        ("temperature", [-0.5, NAN, INF, True, "hot"], "at least 0 and finite"),
        ("top_k", [0], "at least 1"),
        ("top_k", [True, 2.0], "an integer"),
        ("top_p", [0.0, 1.5, NAN], "above 0 and at most 1"),
        ("min_p", [-0.1, 1.1, False], r"in \[0, 1\]"),
        ("typical_p", [0, 2.0, NAN], "above 0 and at most 1"),
        ("repetition_penalty", [0.0, NAN], r"in \[0.01, 100\]"),
        ("presence_penalty", [-INF], r"in \[-100, 100\]"),
        ("frequency_penalty", [NAN], r"in \[-100, 100\]"),
        ("no_repeat_ngram_size", [-1], "at least 0"),
        ("no_repeat_ngram_size", [1.5], "an integer"),
    ],
)
def test_settings_out_of_range_are_refused(name, values, accepted):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} must be {accepted}, got {value!r}$"):
            Sampling(**{name: value})


def test_settings_at_the_ends_of_their_ranges_are_accepted():
    Sampling(temperature=0, top_k=1, top_p=1, min_p=0, typical_p=1, repetition_penalty=100, presence_penalty=-100)
    Sampling(5e-324, top_k=np.int64(3), top_p=5e-324, min_p=np.float32(1), typical_p=5e-324, frequency_penalty=100)
    assert len({Sampling(), Sampling(), EVERYTHING}) == 2
    with pytest.raises(FrozenInstanceError):
        Sampling().top_k = 3


@pytest.mark.parametrize("shape", [(5,), (2, 0)])
def test_logits_of_another_shape_are_refused(shape):
    for chosen in (Sampling(), Sampling(0.0)):
        with pytest.raises(ValueError, match=r"logits must be \[B, V\]"):
            filter_logits(torch.zeros(shape), chosen)


# penalties


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
    ids=str,
)
def test_penalties_equal_numpy(chosen):
    tokens, lengths, prompt_lengths = ragged(vocabulary=9)
    logits = random_logits(len(lengths), 9)
    logits[:, 4] = -INF
    expected = logits.double().cpu().numpy()
    for row, (sequence, length, prompt) in enumerate(zip(tokens.tolist(), lengths, prompt_lengths, strict=True)):
        for token in set(sequence[:length]):
            below_0 = expected[row, token] < 0
            expected[row, token] *= chosen.repetition_penalty if below_0 else 1 / chosen.repetition_penalty
        for token in sequence[prompt:length]:
            expected[row, token] -= chosen.frequency_penalty
        for token in set(sequence[prompt:length]):
            expected[row, token] -= chosen.presence_penalty
    result = process_logits(logits, tokens, lengths, prompt_lengths, chosen)
    np.testing.assert_allclose(result.cpu().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert chosen.needs_history
    assert result.dtype == torch.float32
    assert torch.isfinite(result).any(-1).all()


def test_without_history_nothing_is_penalised():
    tokens, lengths, prompt_lengths = ragged(vocabulary=9)
    logits = random_logits(len(lengths), 9)
    chosen = Sampling(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, typical_p=0.5)
    assert not chosen.needs_history
    assert torch.equal(process_logits(logits, tokens, lengths, prompt_lengths, chosen), logits)
    empty = process_logits(logits, tokens[:, :0], lengths * 0, prompt_lengths * 0, EVERYTHING)
    assert torch.equal(empty, logits)


def test_repetition_penalty_equals_hugging_face():
    tokens, lengths, prompt_lengths = ragged(vocabulary=50)
    logits = random_logits(len(lengths), 50)
    result = process_logits(logits, tokens, lengths, prompt_lengths, Sampling(repetition_penalty=1.7))
    processor = hugging_face.RepetitionPenaltyLogitsProcessor(1.7)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(result[row], processor(tokens[row : row + 1, :length], logits[row : row + 1].clone())[0])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 30])
@pytest.mark.parametrize("vocabulary", [3, 30])
def test_blocked_ngrams_equal_hugging_face(size, vocabulary):
    tokens, lengths, prompt_lengths = ragged(vocabulary)
    logits = random_logits(len(lengths), vocabulary)
    chosen = Sampling(no_repeat_ngram_size=size)
    result = process_logits(logits, tokens, lengths, prompt_lengths, chosen)
    processor = hugging_face.NoRepeatNGramLogitsProcessor(size)
    blocked = 0
    for row, length in enumerate(lengths.tolist()):
        expected = processor(tokens[row : row + 1, :length], logits[row : row + 1].clone())[0]
        if (expected == -INF).all():  # Hugging Face leaves nothing to draw
            expected = logits[row]
        assert torch.equal(result[row], expected)
        blocked += int((expected == -INF).sum())
    assert chosen.needs_history
    assert blocked > 0 or (size, vocabulary) in ((30, 3), (30, 30), (3, 30), (4, 30))


# filters

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
        assert np.array_equal(np.asarray(after)[row], np.asarray(before)[row])  # kept logits do not change


@pytest.mark.parametrize("smallest", [5e-324, 1e-45, 1e-12])
def test_the_smallest_shares_keep_one_token(smallest):
    rows = on_device([[0.0, 0.0, 0.0, 0.0], [1.0, 3.0, 2.0, -INF], [-INF, -INF, -7.0, -INF], [-INF, 5.0, 5.0, -200.0]])
    for keep in (sampling.keep_top_p, sampling.keep_typical):
        assert kept(keep(rows, smallest)).nonzero()[1].tolist() == [0, 1, 2, 1]


def test_shares_of_one_keep_all():
    rows = random_logits(8, 100)
    for keep in (sampling.keep_top_p, sampling.keep_typical):
        dropped = rows.softmax(-1).masked_fill(keep(rows, 1.0) > -INF, 0.0).sum(-1)
        assert dropped.max() < 1e-5  # the rounding of the sum
    assert torch.equal(sampling.keep_min_p(rows, 0.0), rows)
    assert torch.equal(sampling.keep_top_k(rows, 1000), rows)


def test_filters_break_ties_by_lower_ids():
    rows = on_device([[1.0, 2.0, 2.0, 0.0, 2.0]])
    assert kept(sampling.keep_top_k(rows, 2)).tolist() == [[False, True, True, False, True]]
    assert kept(sampling.keep_min_p(rows, 1.0)).tolist() == [[False, True, True, False, True]]
    assert kept(sampling.keep_top_p(rows, 0.5)).tolist() == [[False, True, True, False, False]]
    for keep in (sampling.keep_top_p, sampling.keep_typical):
        for width in (64, 2**12, 2**16):
            equal = kept(keep(torch.zeros(3, width, device=DEVICE), 0.25))
            assert equal.sum(-1).tolist() == equal[:, : width // 4].sum(-1).tolist() == [width // 4] * 3


def test_min_p_compares_probabilities_too_small_for_float32():
    rows = on_device([[0.0, -110.0, -120.0]])
    assert kept(sampling.keep_min_p(rows, 1e-50)).tolist() == [[True, True, False]]


def test_the_likeliest_token_may_be_untypical():
    rows = on_device([[0.35, *[0.065] * 10]]).log()
    assert not kept(sampling.keep_typical(rows, 0.2))[0, 0]
    assert draw(rows, Sampling(temperature=0.0, typical_p=0.2)).tolist() == [0]  # temperature comes first


@pytest.mark.parametrize(
    ("ours", "theirs", "values"),
    [
        (sampling.keep_top_k, hugging_face.TopKLogitsWarper, (1, 7, 300, 5000)),
        (sampling.keep_top_p, hugging_face.TopPLogitsWarper, (0.01, 0.5, 0.95)),
        (sampling.keep_min_p, hugging_face.MinPLogitsWarper, (0.0, 0.01, 0.3, 1.0)),
        (sampling.keep_typical, hugging_face.TypicalLogitsWarper, (0.02, 0.5, 0.95)),
    ],
)
def test_filters_equal_hugging_face(ours, theirs, values):
    for value in values:
        for scale in (0.5, 3.0):
            logits = random_logits(32, 1000, scale=scale)
            logits[::2, ::3] = -INF
            assert torch.equal(ours(logits, value), theirs(value)(None, logits.clone()))


def test_the_order_of_the_filters_is_hugging_faces():
    chosen = Sampling(temperature=1.7, top_k=60, top_p=0.8, min_p=0.04, typical_p=0.7)
    logits = random_logits(64, 1000)
    warpers = [
        hugging_face.TemperatureLogitsWarper(1.7),
        hugging_face.TopKLogitsWarper(60),
        hugging_face.TopPLogitsWarper(0.8),
        hugging_face.MinPLogitsWarper(0.04),
        hugging_face.TypicalLogitsWarper(0.7),
    ]

    def theirs(order: list) -> torch.Tensor:
        return hugging_face.LogitsProcessorList(order)(None, logits)

    expected, result = theirs(warpers), filter_logits(logits, chosen)
    assert np.array_equal(kept(result), kept(expected))
    torch.testing.assert_close(result.softmax(-1), expected.softmax(-1))
    # the order matters: with neighbours exchanged other tokens are kept; top-k and temperature alone commute
    for first in (1, 2, 3):
        exchanged = [*warpers]
        exchanged[first : first + 2] = warpers[first + 1], warpers[first]
        assert not np.array_equal(kept(theirs(exchanged)), kept(expected))
    assert not np.array_equal(kept(theirs([*warpers[1:], warpers[0]])), kept(expected))


# draws


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
    ids=str,
)
def test_draws_follow_the_filtered_distribution(chosen):
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
    drawn = draw(logits.expand(20_000, -1), chosen, generator())
    assert drawn.shape == (20_000,)
    assert drawn.dtype == torch.int64
    assert_distributed(drawn.bincount(minlength=8), torch.from_numpy(softmax(tempered)))


def test_rows_are_drawn_independently():
    drawn = draw(torch.zeros(20_000, 2, device=DEVICE), Sampling(), generator())
    assert_distributed(torch.bincount(drawn[::2] * 2 + drawn[1::2], minlength=4), torch.full((4,), 0.25))


@pytest.mark.parametrize(
    "chosen", [Sampling(temperature=0.0), Sampling(0, top_k=3, top_p=0.5, min_p=0.1, typical_p=0.1)]
)
def test_greedy_takes_the_first_of_the_likeliest_tokens(chosen):
    logits = random_logits(64, 100)
    assert torch.equal(draw(logits, chosen), logits.argmax(-1))
    assert kept(filter_logits(logits, chosen)).nonzero()[1].tolist() == logits.argmax(-1).tolist()
    assert draw(on_device([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]]), chosen).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 5e-324])
@pytest.mark.parametrize("others", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"typical_p": 0.5}], ids=str)
def test_the_smallest_temperatures_are_greedy(temperature, others):
    logits = random_logits(64, 100, scale=30.0)
    logits[:, 3] = -INF
    assert torch.equal(draw(logits, Sampling(temperature, **others)), logits.argmax(-1))
    # but draw among equals
    drawn = draw(on_device([[3e38, -3e38, 3e38, -INF]]).expand(100, -1), Sampling(temperature), generator())
    assert set(drawn.tolist()) == {0, 2}


@pytest.mark.parametrize("temperature", [1e30, 1e40, 1.7e308])
def test_the_largest_temperatures_are_uniform(temperature):
    logits = filter_logits(on_device([[5.0, -5.0, -INF, 0.0]]), Sampling(temperature))
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
def test_any_settings_leave_a_token_and_draw_it(rows, chosen):
    assume(all(max(row) > -INF for row in rows))
    logits = torch.tensor(rows, dtype=torch.float32, device=DEVICE)
    result = filter_logits(logits, chosen)
    assert not result.isnan().any()
    assert (result.amax(-1) <= 0.0).all()
    assert result.isfinite().any(-1).all()
    assert not kept(result)[~kept(logits)].any()
    require_finite(result.amax(-1).tolist())
    drawn = draw(logits, chosen, generator())
    assert result.gather(1, drawn[:, None]).isfinite().all()


def test_noise_of_zero_draws_no_removed_token(monkeypatch):
    """Some devices' exponential_ returns 0."""
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator=None: self.zero_())
    logits = on_device([[-INF, 2.0, 1.0, -INF], [-INF, -INF, -INF, 0.0]])
    noise = exponential_noise(logits)
    assert (noise > 0.0).all()
    assert noise.dtype == torch.float32
    assert (1.0 / noise).isfinite().all()
    assert draw(logits, Sampling()).tolist() == [1, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_filtered_in_float32(dtype):
    logits = random_logits(16, 300).to(dtype)
    result = filter_logits(logits, EVERYTHING)
    assert result.dtype == torch.float32
    assert torch.equal(result, filter_logits(logits.float(), EVERYTHING))


@pytest.mark.parametrize(
    ("row", "found"),
    [([NAN, 0.0, 1.0], "NaN"), ([NAN] * 3, "NaN"), ([0.0, INF, -INF], "inf"), ([-INF] * 3, "-inf alone")],
)
def test_rows_without_a_distribution_are_refused(row, found):
    def check(logits: torch.Tensor) -> None:
        require_finite(logits.amax(-1).tolist())

    logits = on_device([[0.0, 1.0, 2.0], [-INF, 0.0, -INF], row, [NAN] * 3])
    check(logits[:2])
    with pytest.raises(ValueError, match=f"^row 2 of the logits has {found}; "):
        check(logits)
    for chosen in (Sampling(), Sampling(0.0), Sampling(5e-324), Sampling(top_k=1), Sampling(0.7, 2, 0.5, 0.1, 0.3)):
        with pytest.raises(ValueError, match="row 2 of the logits has"):
            check(filter_logits(logits, chosen))
        drawn = draw(logits, chosen, generator())  # cannot raise, and returns a token that can be looked up
        assert 0 <= drawn.min() <= drawn.max() < 3


# capture


def everything(logits, tokens, lengths, prompt_lengths, chosen):
    return draw(process_logits(logits, tokens, lengths, prompt_lengths, chosen), chosen)


def test_arguments_are_not_changed():
    arguments = (random_logits(8, 100), *ragged(vocabulary=100))
    before = [tensor.clone() for tensor in arguments]
    everything(*arguments, EVERYTHING)
    assert all(map(torch.equal, before, arguments))


def test_sampling_compiles_as_one_graph():
    torch._dynamo.reset()
    arguments = logits, *_ = random_logits(8, 100), *ragged(vocabulary=100)
    filters = torch.compile(filter_logits, fullgraph=True, backend="aot_eager")
    whole = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for chosen in (EVERYTHING, Sampling(temperature=0.0), Sampling(0.5, top_k=7), Sampling(0.6, top_k=9, top_p=0.7)):
        assert torch.equal(filters(logits, chosen), filter_logits(logits, chosen))
        torch.manual_seed(0)
        expected = everything(*arguments, chosen)
        torch.manual_seed(0)
        assert torch.equal(whole(*arguments, chosen), expected)
    # with a generator, the noise is drawn outside
    sample = torch.compile(sampling.sample, fullgraph=True, backend="aot_eager")
    noise = exponential_noise(logits, generator())
    assert torch.equal(sample(logits, noise, EVERYTHING), draw(logits, EVERYTHING, generator()))


@pytest.mark.parametrize("chosen", [EVERYTHING, Sampling(), Sampling(temperature=0.0)], ids=str)
def test_sampling_does_not_synchronise(chosen):
    """On tensors without values: reading one, or a shape that depends on one, raises."""
    meta = [torch.empty(3, 50, device="meta")]
    meta += [torch.empty(shape, dtype=torch.int64, device="meta") for shape in ((3, 12), (3,), (3,))]
    assert everything(*meta, chosen).shape == (3,)
    with pytest.raises((RuntimeError, NotImplementedError)):
        meta[0].amax(-1).tolist()
    with FakeTensorMode():
        fake = [torch.zeros(tensor.shape, dtype=tensor.dtype, device=DEVICE) for tensor in meta]
        assert everything(*fake, chosen).shape == (3,)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_sampling_is_captured_in_a_cuda_graph():
    arguments = (random_logits(8, 5000), *ragged(vocabulary=5000))
    everything(*arguments, EVERYTHING)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = everything(*arguments, EVERYTHING)
    results = []
    for _ in range(2):
        graph.replay()
        results.append(drawn.clone())
    assert 0 <= drawn.min() <= drawn.max() < 5000
    assert not torch.equal(*results)
