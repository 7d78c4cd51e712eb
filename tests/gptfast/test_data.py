import numpy as np
import pytest
import torch

from gptfast import data


def test_targets_are_the_tokens_that_follow():
    part = data.Split(np.arange(100), block_size=7)
    for idx, targets in [part.random_batch(5, seed=1, step=2), *part.even_batches(3, 4)]:
        assert idx.dtype == targets.dtype == torch.int64
        assert idx.shape == targets.shape == (len(idx), 7)
        assert torch.equal(targets, idx + 1)
        assert torch.equal(idx, idx[:, :1] + torch.arange(7))


def test_random_batches_are_a_function_of_seed_and_step():
    part = data.Split(np.arange(1000), block_size=7)
    first = part.random_batch(5, seed=1, step=2)[0]
    assert torch.equal(part.random_batch(5, seed=1, step=2)[0], first)
    assert not torch.equal(part.random_batch(5, seed=1, step=3)[0], first)
    assert not torch.equal(part.random_batch(5, seed=2, step=2)[0], first)


def test_every_place_can_be_drawn_and_none_beyond():
    part = data.Split(np.arange(10), block_size=7)
    starts = part.random_batch(200, seed=0, step=0)[0][:, 0]
    assert set(starts.tolist()) == {0, 1, 2}


def test_even_batches_cover_the_split_without_overlap_where_it_is_long_enough():
    part = data.Split(np.arange(1000), block_size=10)
    starts = torch.cat([idx[:, 0] for idx, _ in part.even_batches(4, 5)])
    assert len(starts) == 20
    assert (starts[0], starts[-1]) == (0, 989)
    assert (starts.diff() >= 10).all()
    # a short split gives as many sequences as it has
    assert sum(len(idx) for idx, _ in data.Split(np.arange(35), 10).even_batches(4, 5)) == 3


def test_split_takes_the_end_away():
    train, val = data.split(np.arange(100), block_size=5, held_out=0.1)
    assert train.tokens.tolist() == list(range(90))
    assert val.tokens.tolist() == list(range(90, 100))


@pytest.mark.parametrize(("length", "fits"), [(59, False), (60, True)])
def test_both_parts_need_a_block_and_its_successor(length, fits):
    if fits:
        train, val = data.split(np.arange(length), block_size=5, held_out=0.1)
        assert len(val.random_batch(1, 0, 0)[0]) == len(train.even_batches(1, 1)[0][0]) == 1
    else:
        with pytest.raises(ValueError, match="too short: 59 tokens make 53 to train on and 6 held out, each must be"):
            data.split(np.arange(length), block_size=6, held_out=0.1)
