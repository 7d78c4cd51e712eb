import time

import numpy as np
import pytest
import torch

from gptfast.data import batches
from gptfast.data.shards import Tokens


def split_of(length: int, block_size: int) -> batches.Split:
    return batches.Split(Tokens([np.arange(length)]), block_size)


def test_random_batch_has_the_next_tokens_as_targets():
    part = split_of(100, block_size=7)
    for idx, targets in [part.random_batch(5, seed=1, step=2), *part.eval_batches(3, 4)]:
        assert idx.dtype == targets.dtype == torch.int64
        assert idx.shape == targets.shape == (len(idx), 7)
        assert torch.equal(targets, idx + 1)
        assert torch.equal(idx, idx[:, :1] + torch.arange(7))


def test_random_batch_is_a_function_of_seed_and_step():
    part = split_of(1000, block_size=7)
    first = part.random_batch(5, seed=1, step=2)[0]
    assert torch.equal(part.random_batch(5, seed=1, step=2)[0], first)
    assert not torch.equal(part.random_batch(5, seed=1, step=3)[0], first)
    assert not torch.equal(part.random_batch(5, seed=2, step=2)[0], first)


def test_random_batch_reaches_every_offset():
    part = split_of(10, block_size=7)
    starts = part.random_batch(200, seed=0, step=0)[0][:, 0]
    assert set(starts.tolist()) == {0, 1, 2}


def test_random_batch_visits_every_block_once_an_epoch():
    part = split_of(10 * 7 + 5, block_size=7)
    starts = torch.cat([part.random_batch(4, seed=3, step=step)[0][:, 0] for step in range(9)])  # 36: four epochs
    epochs = starts.view(4, 9)
    assert (epochs.sort(dim=1).values.diff(dim=1) == 7).all()
    assert len({tuple(epoch.tolist()) for epoch in epochs - epochs.min(dim=1, keepdim=True).values}) == 4
    assert len(set(epochs.min(dim=1).values.tolist())) > 1


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_random_batch_is_the_same_for_any_number_of_ranks(ranks: int):
    part = split_of(1000, block_size=7)
    whole = [part.random_batch(8, seed=1, step=step)[0] for step in range(20)]
    for step, expected in enumerate(whole):
        parts = [part.random_batch(8, seed=1, step=step, rank=rank, ranks=ranks)[0] for rank in range(ranks)]
        assert torch.equal(torch.cat(parts), expected)


def test_eval_batches_cover_the_split_without_overlap():
    part = split_of(1000, block_size=10)
    starts = torch.cat([idx[:, 0] for idx, _ in part.eval_batches(4, 5)])
    assert len(starts) == 20
    assert (starts[0], starts[-1]) == (0, 989)
    assert (starts.diff() >= 10).all()
    # a short split gives as many sequences as it has
    assert sum(len(idx) for idx, _ in split_of(35, 10).eval_batches(4, 5)) == 3


def test_split_tokens_holds_out_the_end():
    train, val = batches.split_tokens(np.arange(100), block_size=5, held_out=0.1)
    assert train.tokens.windows(np.array([0]), 90).tolist() == [list(range(90))]
    assert val.tokens.windows(np.array([0]), 10).tolist() == [list(range(90, 100))]


@pytest.mark.parametrize(("length", "fits"), [(59, False), (60, True)])
def test_split_tokens_needs_a_block_and_its_target_in_both_parts(length, fits):
    if fits:
        train, val = batches.split_tokens(np.arange(length), block_size=5, held_out=0.1)
        assert len(val.random_batch(1, 0, 0)[0]) == len(train.eval_batches(1, 1)[0][0]) == 1
    else:
        with pytest.raises(ValueError, match=r"53 tokens to train on and 6 held out, .* with --held-out 0$"):
            batches.split_tokens(np.arange(length), block_size=6, held_out=0.1)


def test_split_tokens_with_nothing_held_out_is_one_split():
    train, val = batches.split_tokens(np.arange(11), block_size=10, held_out=0.0)
    assert val is train
    assert train.tokens.windows(np.array([0]), 11).tolist() == [list(range(11))]
    assert [idx.tolist() for idx, _ in train.eval_batches(20, 4)] == [[list(range(10))]]
    assert all(train.random_batch(2, 0, step)[1].tolist() == [list(range(1, 11))] * 2 for step in range(5))
    with pytest.raises(ValueError, match=r"too short: 11 tokens to train on, more than block_size=11 are needed"):
        batches.split_tokens(np.arange(11), block_size=11, held_out=0.0)


def test_prefetcher_returns_the_batches_in_order():
    asked = []
    prefetcher = batches.Prefetcher(lambda step: asked.append(step) or (torch.tensor(step), torch.tensor(-step)), 3, 6)
    assert [tuple(map(int, prefetcher.next())) for _ in range(3)] == [(3, -3), (4, -4), (5, -5)]
    prefetcher.close()
    assert asked == [3, 4, 5]


@pytest.mark.parametrize(("batch", "step", "waits"), [(0.02, 0.06, False), (0.06, 0.02, True)])
def test_prefetcher_computes_during_the_step_before(batch, step, waits):
    prefetcher = batches.Prefetcher(lambda number: time.sleep(batch), 0, 10)
    prefetcher.next()
    waited = prefetcher.waited
    for _ in range(8):
        time.sleep(step)
        prefetcher.next()
    prefetcher.close()
    assert prefetcher.waited - waited == pytest.approx(8 * 0.04 if waits else 0.0, abs=0.06)


def test_prefetcher_raises_the_error_of_its_batch():
    def damaged(step):
        raise ValueError("a shard is damaged")

    prefetcher = batches.Prefetcher(damaged, 0, 10)
    with pytest.raises(ValueError, match="a shard is damaged"):
        prefetcher.next()
    prefetcher.close()


def test_fingerprint_differs_for_other_tokens():
    ids = np.arange(5000) % 17
    first, same = (batches.Split(Tokens([ids]), length) for length in (8, 16))
    assert first.fingerprint() == same.fingerprint() == batches.Split(Tokens([ids[:70], ids[70:]]), 8).fingerprint()
    changed = ids.copy()
    changed[4999] = 3
    for other in (changed, ids[:-1], ids[::-1]):
        assert batches.Split(Tokens([other]), 8).fingerprint() != first.fingerprint()
