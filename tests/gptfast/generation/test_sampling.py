import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from gptfast.generation import sampling
from gptfast.generation.sampling import Sampling, draw, filtered
from tests.support.logits import (
    EVERYTHING,
    INF,
    NAN,
    generator,
    kept,
    numpy_min_p,
    numpy_top_k,
    numpy_top_p,
    numpy_typical,
    on_device,
    ragged,
    random_logits,
    softmax,
)
from tests.support.oracle import DEVICE


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
