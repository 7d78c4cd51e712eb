"""Beam search against Hugging Face transformers, exhaustive search and hand-computed cases."""

import itertools
import math

import pytest
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measuring import model_bench
from gptfast import GPT
from gptfast.generation import beam_search
from gptfast.generation.beam_search import NO_HYPOTHESIS, BeamSearch, Hypothesis
from gptfast.generation.decoder import CachedDecoder, GenerationRequest, RawLogits
from tests.support.generation import gpt
from tests.support.oracle import DEVICE

SIZES = {"block_size": 20, "n_layer": 1, "n_embd": 16, "init_std": 0.6}
NEW = 12
# of different lengths, so that each search takes another course
PROMPTS = [[3, 14, 15, 9, 2, 6], [5, 3], [5, 8, 9, 7]]
PAD = 4


def cached(model: GPT, prompts: list[list[int]]) -> CachedDecoder[torch.Tensor]:
    idx = pad_sequence([torch.tensor(prompt, device=DEVICE) for prompt in prompts], batch_first=True)
    return CachedDecoder(model, GenerationRequest(idx, [len(prompt) for prompt in prompts], NEW), RawLogits())


class Fixed:
    """A decoder that returns the same log-probabilities after every token."""

    def __init__(self, probabilities: list[float], prompts: int = 1) -> None:
        self.log_probs = torch.tensor(probabilities, device=DEVICE).log()
        self.rows = prompts
        self.steps = 0

    def prefill(self) -> torch.Tensor:
        return self.log_probs.expand(self.rows, -1)

    def decode_one_token(self, tokens: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return self.log_probs.expand(len(tokens), -1)

    def reorder(self, rows: torch.Tensor) -> None:
        pass


def search(decoder, prompt_batch: int, max_new_tokens: int, num_beams: int, stop_tokens=(), process=None, **settings):
    settings = BeamSearch(num_beams, **settings)
    return beam_search.search(decoder, prompt_batch, max_new_tokens, settings, stop_tokens, process)


def ours(model: GPT, prompts: list[list[int]], num_beams: int, **settings) -> list[list[Hypothesis]]:
    return search(cached(model, prompts), len(prompts), NEW, num_beams, **settings)


def theirs(hugging_face, prompts, num_beams, stop_tokens, num_return_sequences, **settings) -> list[list[Hypothesis]]:
    """Hypotheses of transformers for prompts padded on the left."""
    longest = max(map(len, prompts))
    idx = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts], device=DEVICE)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=DEVICE)
    with torch.no_grad():
        output = hugging_face.generate(
            idx,
            attention_mask=mask,
            max_new_tokens=NEW,
            num_beams=num_beams,
            do_sample=False,
            eos_token_id=list(stop_tokens) or None,
            pad_token_id=PAD,
            num_return_sequences=num_return_sequences,
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
    found = []
    scores = output.sequences_scores.tolist()
    lengths = (output.beam_indices >= 0).sum(1).tolist()  # the padding is a token like others
    for padded, score, length in zip(output.sequences[:, longest:].tolist(), scores, lengths, strict=True):
        tokens = padded[:length]
        found.append(Hypothesis(tokens, score, tokens[-1] in stop_tokens))
    return [found[row : row + num_return_sequences] for row in range(0, len(found), num_return_sequences)]


def assert_same(mine: list[list[Hypothesis]], expected: list[list[Hypothesis]]) -> None:
    for of_prompt, expected_of_prompt in zip(mine, expected, strict=True):
        assert [h.tokens for h in of_prompt] == [h.tokens for h in expected_of_prompt]
        assert [h.finished for h in of_prompt] == [h.finished for h in expected_of_prompt]
        for hypothesis, reference in zip(of_prompt, expected_of_prompt, strict=True):
            assert hypothesis.score == pytest.approx(reference.score, rel=1e-5, abs=1e-5)


def hugging_face(model: GPT):
    return model_bench.providers(None)["Hugging Face"].build(model)


# tokens that some beams of these models reach, at different steps
STOPS = {"none": (), "one": (12,), "several": (12, 7, 21)}


@pytest.mark.parametrize("stops", STOPS)
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(("seed", "num_beams"), [(0, 2), (0, 5), (2, 3), (2, 4)])
def test_hypotheses_equal_transformers(seed, num_beams, early_stopping, stops):
    model = gpt(seed, **SIZES)
    reference = hugging_face(model)
    finished = []
    for length_penalty in (0, 1.0, 2.0, -1.0, 0.6):
        settings = {
            "length_penalty": length_penalty,
            "early_stopping": early_stopping,
            "stop_tokens": STOPS[stops],
            "num_return_sequences": num_beams,
        }
        mine = ours(model, PROMPTS, num_beams, **settings)
        assert_same(mine, theirs(reference, PROMPTS, num_beams, **settings))
        finished += [hypothesis.finished for of_prompt in mine for hypothesis in of_prompt]
    assert any(finished) == (stops != "none")


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[1:]])
@pytest.mark.parametrize("num_return_sequences", [1, 2, 4])
def test_numbers_of_prompts_and_hypotheses_equal_transformers(prompts, num_return_sequences):
    model = gpt(1, **SIZES)
    settings = {"stop_tokens": (12, 9), "num_return_sequences": num_return_sequences}
    assert_same(ours(model, prompts, 4, **settings), theirs(hugging_face(model), prompts, 4, **settings))


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_one_beam_is_greedy(early_stopping):
    model = gpt(0, **SIZES)
    found = ours(model, PROMPTS, 1, early_stopping=early_stopping, stop_tokens=[12, 5], length_penalty=0.6)
    for prompt, (hypothesis,) in zip(PROMPTS, found, strict=True):
        idx = torch.tensor([prompt], device=DEVICE)
        greedy = model.generate(idx, NEW, temperature=0.0)[0, len(prompt) :].tolist()
        stop = next((place + 1 for place, token in enumerate(greedy) if token in (12, 5)), None)
        assert hypothesis.tokens == greedy[:stop]
        assert hypothesis.finished == (stop is not None)
        assert hypothesis.score == pytest.approx(log_prob(model, prompt, hypothesis.tokens) / len(greedy[:stop]) ** 0.6)


@torch.no_grad()
def log_prob(model: GPT, prompt: list[int], tokens: list[int]) -> float:
    idx = torch.tensor([prompt + tokens], device=DEVICE)
    log_probs = model(idx, idx)[0].float().log_softmax(-1)[0, len(prompt) - 1 : -1]
    return log_probs[torch.arange(len(tokens)), tokens].sum().item()


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -1.0, 2.5])
def test_enough_beams_rank_all_sequences(length_penalty, early_stopping):
    """121 sequences end with the stop token or after four tokens; 128 beams lose none."""
    model = gpt(0, vocab_size=4, **SIZES)
    prompts = [[1, 0, 2], [3]]
    stop = 2
    found = search(
        cached(model, prompts), 2, 4, 128, length_penalty=length_penalty, early_stopping=early_stopping,
        stop_tokens=[stop], num_return_sequences=128,
    )  # fmt: skip
    for prompt, of_prompt in zip(prompts, found, strict=True):
        sequences = set()
        for tokens in itertools.product(range(4), repeat=4):
            sequences.add(tokens[: tokens.index(stop) + 1] if stop in tokens else tokens)
        scores = {tokens: log_prob(model, prompt, list(tokens)) / len(tokens) ** length_penalty for tokens in sequences}
        ranking = sorted(scores, key=scores.__getitem__, reverse=True)
        assert len(ranking) == 121
        assert [tuple(hypothesis.tokens) for hypothesis in of_prompt[:121]] == ranking
        for hypothesis, tokens in zip(of_prompt, ranking, strict=False):
            assert hypothesis.score == pytest.approx(scores[tokens], rel=1e-5)
            assert hypothesis.finished == (tokens[-1] == stop)
        assert of_prompt[121:] == [NO_HYPOTHESIS] * 7


@pytest.mark.parametrize(
    ("probabilities", "length_penalty", "early_stopping", "limit", "steps", "expected"),
    [
        # token 0 continues and 1 stops; over with the second finished sequence
        ([0.6, 0.4], 1, True, 3, 1, {(0, 1): 0.24, (1,): 0.4}),
        # not over: 0, 0 is better per token
        ([0.6, 0.4], 1, False, 3, 2, {(0, 0, 0): 0.216, (0, 0, 1): 0.144}),
        # over: 0, 0 with 0.16 ** (1 / 2) per token is behind 0, 1 with 0.24 ** (1 / 2)
        ([0.4, 0.6], 1, False, 4, 1, {(1,): 0.6, (0, 1): 0.24}),
        # not over: four tokens of 0.16 would have been 0.16 ** (1 / 4), those of 0.064 after one more too
        ([0.4, 0.6], 1, "never", 4, 3, {(1,): 0.6, (0, 1): 0.24}),
        # without a length reward, four tokens are no better than two
        ([0.4, 0.6], 0, "never", 4, 1, {(1,): 0.6, (0, 1): 0.24}),
        # with a length penalty a beam is best finished now: t * t * log(0.9) is behind 2 * log(0.09) from t = 7 on
        ([0.9, 0.1], -1, "never", 30, 6, {(1,): 0.1, (0, 1): 0.09}),
    ],
)
def test_a_search_ends_by_its_rule(probabilities, length_penalty, early_stopping, limit, steps, expected):
    decoder = Fixed(probabilities)
    (found,) = search(
        decoder, 1, limit, 2, length_penalty=length_penalty, early_stopping=early_stopping, stop_tokens=[1],
        num_return_sequences=2,
    )  # fmt: skip
    assert [tuple(hypothesis.tokens) for hypothesis in found] == list(expected)
    for hypothesis, probability in zip(found, expected.values(), strict=True):
        assert hypothesis.score == pytest.approx(math.log(probability) / len(hypothesis.tokens) ** length_penalty)
    assert decoder.steps == steps


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_removing_finished_prompts_changes_nothing(reads, num_beams, early_stopping):
    model = gpt(0, **SIZES)
    prompts = [*PROMPTS, [9, 17], [12], [0, 0, 1]]
    settings = {
        "stop_tokens": STOPS["several"],
        "early_stopping": early_stopping,
        "length_penalty": -1.0,
        "num_return_sequences": num_beams,
    }
    together = search(cached(model, prompts), len(prompts), NEW, num_beams, **settings)
    rows = [shape[0] for _, shape in reads]
    lengths = []
    for prompt, of_prompt in zip(prompts, together, strict=True):
        reads.clear()
        assert_same([of_prompt], search(cached(model, [prompt]), 1, NEW, num_beams, **settings))
        lengths.append(len(reads))
    # each prompt is computed as often as alone
    assert len(set(lengths)) > 2
    live = [sum(length > step for length in lengths) for step in range(max(lengths))]
    assert rows == [len(prompts), *(num_beams * count for count in live[1:])]


PROCESSED = {
    "ngrams": {"no_repeat_ngram_size": 2},
    "penalty": {"repetition_penalty": 1.7},
    # in the order of transformers
    "all": {"repetition_penalty": 0.8, "no_repeat_ngram_size": 3, "suppress_tokens": [14, 6, 11]},
}


@pytest.mark.parametrize("stops", STOPS)
@pytest.mark.parametrize("name", PROCESSED)
def test_processed_log_probabilities_equal_transformers(name, stops):
    of_name = {
        "no_repeat_ngram_size": transformers.NoRepeatNGramLogitsProcessor,
        "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
        "suppress_tokens": lambda tokens: transformers.SuppressTokensLogitsProcessor(tokens, device=DEVICE),
    }
    # of equal length, because transformers penalises the padding
    prompts = [prompt[:2] for prompt in PROMPTS]
    changed = []
    for seed in range(3):
        model = gpt(seed, **SIZES)
        decoder = cached(model, prompts)
        processors = [of_name[setting](value) for setting, value in PROCESSED[name].items()]

        def process(log_probs, tokens, decoder=decoder, processors=processors):
            whole = decoder.tokens[:, : 2 + tokens.shape[1]]
            assert torch.equal(whole[:, 2:], tokens)
            for processor in processors:
                log_probs = processor(whole, log_probs)
            return log_probs

        settings = {"stop_tokens": STOPS[stops], "num_return_sequences": 3, "early_stopping": "never"}
        mine = search(decoder, len(prompts), NEW, 3, process=process, **settings)
        assert_same(mine, theirs(hugging_face(model), prompts, 3, **settings, **PROCESSED[name]))
        changed.append(mine != search(cached(model, prompts), len(prompts), NEW, 3, **settings))
    assert any(changed)


def test_missing_hypotheses_are_marked():
    (found,) = search(Fixed([0.5, 0.3, 0.2]), 1, 1, 5, num_return_sequences=5)
    assert [hypothesis.tokens for hypothesis in found] == [[0], [1], [2], [], []]
    assert found[3:] == [NO_HYPOTHESIS] * 2
    decoder = Fixed([0.5, 0.3, 0.2], prompts=2)

    def forbid_all(log_probs, tokens):
        return torch.full_like(log_probs, -math.inf)

    assert search(decoder, 2, 8, 2, stop_tokens=[1], process=forbid_all) == [[NO_HYPOTHESIS], [NO_HYPOTHESIS]]
    assert decoder.steps == 0


def test_one_prompt_may_run_out_of_tokens_alone():
    """All tokens are forbidden after the first token of the first prompt."""
    decoder = Fixed([0.5, 0.3, 0.2], prompts=2)

    def forbid(log_probs, tokens):
        rows = len(tokens) // 2 if tokens.shape[1] == 1 else 0
        return torch.cat((torch.full_like(log_probs[:rows], -math.inf), log_probs[rows:]))

    first, second = search(decoder, 2, 3, 2, stop_tokens=[2], num_return_sequences=2, process=forbid)
    assert first == [NO_HYPOTHESIS] * 2
    assert [hypothesis.tokens for hypothesis in second] == [[0, 0, 0], [0, 0, 1]]


def test_no_new_tokens_give_the_empty_continuation():
    found = search(Fixed([0.5, 0.5]), 3, 0, 2, num_return_sequences=2)
    assert found == [[Hypothesis([], 0.0, False), NO_HYPOTHESIS]] * 3


def test_repeated_stop_tokens_count_once():
    model = gpt(0, **SIZES)
    once = ours(model, PROMPTS, 3, stop_tokens=(12, 7), num_return_sequences=3)
    assert ours(model, PROMPTS, 3, stop_tokens=[7, 12, 7, 12, 12], num_return_sequences=3) == once


def test_float16_logits_are_summed_in_float32():
    class Half(Fixed):
        def prefill(self):
            return super().prefill().half()

        def decode_one_token(self, tokens):
            return super().decode_one_token(tokens).half()

    ((found,),) = search(Half([0.9, 0.1]), 1, 50, 2, length_penalty=0.0)
    expected = torch.tensor([0.9, 0.1]).log().half().double().log_softmax(0)[0].item()
    assert found.score == pytest.approx(50 * expected, rel=1e-5)


class NoSynchronisation(TorchDispatchMode):
    """Fails on operations that synchronise with the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waiting = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")
        assert func.overloadpacket.__name__.split(".")[-1] not in waiting, func
        return func(*args, **(kwargs or {}))


def test_the_host_copies_flags_once_a_step(monkeypatch):
    decoder = Fixed([0.45, 0.45, 0.1], prompts=2)
    reads = []  # number of steps before each copy, and its dtype
    tolist = torch.Tensor.tolist

    def counted(tensor):
        reads.append((decoder.steps, tensor.dtype))
        return tolist(tensor)

    def forbid(log_probs, tokens):
        """Forbid all tokens of the first prompt after its third."""
        rows = len(tokens) // 2 if tokens.shape[1] == 3 else 0
        return torch.cat((torch.full_like(log_probs[:rows], -math.inf), log_probs[rows:]))

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    for stops, process in ((), None), ((2,), None), ((2,), forbid):
        reads.clear()
        decoder.steps = 0
        with NoSynchronisation():
            search(decoder, 2, 6, 3, stop_tokens=stops, process=process)
        flags = [read for read in reads if read[1] == torch.bool]
        assert flags == [(step, torch.bool) for step in range(5) if stops]
        assert {step for step, _ in reads[len(flags) :]} == {5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_batch": 0}, "prompt_batch must be at least 1, got 0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ({"num_return_sequences": 3}, "num_return_sequences must be from 1 to num_beams=2, got 3"),
        ({"num_return_sequences": 0}, "num_return_sequences must be from 1 to num_beams=2, got 0"),
        ({"length_penalty": math.inf}, "length_penalty must be finite, got inf"),
        ({"length_penalty": math.nan}, "length_penalty must be finite, got nan"),
        (
            {"length_penalty": -64.0},
            r"length_penalty must leave max_new_tokens \*\* length_penalty within float32, got -64.0 for "
            "max_new_tokens=4",
        ),
        ({"early_stopping": "always"}, "early_stopping must be True, False or 'never', got 'always'"),
        ({"early_stopping": 1}, "early_stopping must be True, False or 'never', got 1"),
        ({"stop_tokens": [1, 3, -1]}, "stop_tokens must be from 0 to 2, got -1, 3"),
        ({"stop_tokens": [2, 0, 1]}, "a search with 3 stop tokens needs a vocabulary of at least 4, got 3"),
        ({"prompt_batch": 2}, r"the decoder's logits must be \[2, V\], got shape \(1, 3\)"),
        (
            {"process": lambda log_probs, tokens: log_probs[:, :2]},
            r"process must keep the shape \(1, 3\), got \(1, 2\)",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    settings = {"prompt_batch": 1, "max_new_tokens": 4, "num_beams": 2} | arguments
    with pytest.raises(ValueError, match=message):
        search(Fixed([0.5, 0.3, 0.2]), **settings)


@pytest.mark.parametrize("length_penalty", [-62.0, 62.0])
def test_the_largest_length_penalties_keep_scores_finite(length_penalty):
    (found,) = search(
        Fixed([0.5, 0.3, 0.2]), 1, 4, 2, length_penalty=length_penalty, early_stopping="never", stop_tokens=[2],
        num_return_sequences=2,
    )  # fmt: skip
    assert [hypothesis.score > -math.inf for hypothesis in found] == [True, True]
