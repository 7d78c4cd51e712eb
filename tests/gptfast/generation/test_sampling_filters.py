import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers.generation import logits_process as hugging_face

from gptfast.generation import sampling
from gptfast.generation.sampling import Sampling, draw, filtered
from tests.support.logits import (
    INF,
    kept,
    numpy_min_p,
    numpy_top_k,
    numpy_top_p,
    numpy_typical,
    on_device,
    random_logits,
)
from tests.support.oracle import DEVICE

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
