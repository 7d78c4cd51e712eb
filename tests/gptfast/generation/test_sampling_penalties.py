import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hugging_face

from gptfast.generation import sampling
from gptfast.generation.sampling import Sampling
from tests.support.logits import EVERYTHING, INF, on_device, ragged, random_logits
from tests.support.oracle import DEVICE


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


@pytest.mark.parametrize(
    "chosen",
    [Sampling(repetition_penalty=1.5), Sampling(repetition_penalty=0.5), Sampling(presence_penalty=-0.7),
     Sampling(frequency_penalty=0.3), Sampling(no_repeat_ngram_size=1), EVERYTHING],
    ids=str,
)  # fmt: skip
def test_all_that_looks_back_is_processed(chosen):
    given = (random_logits(8, 9), *ragged(vocabulary=9), chosen)
    expected = sampling.penalize(*given)
    if chosen.no_repeat_ngram_size:
        expected = sampling.block_ngrams(expected, *given[1:3], chosen.no_repeat_ngram_size)
    assert chosen.looks_back
    assert not torch.equal(expected, given[0])
    assert torch.equal(sampling.process(*given), expected)


def test_without_penalties_nothing_is_looked_at():
    logits, chosen = random_logits(8, 9), Sampling(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, typical_p=0.5)
    assert not chosen.looks_back
    assert torch.equal(sampling.process(logits, *ragged(vocabulary=9), chosen), logits)
