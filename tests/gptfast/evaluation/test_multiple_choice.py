"""Choices between endings: what is read of a file, the tokens of an ending, its likelihood, and which one is taken."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

from gptfast import GPT, GPTConfig
from gptfast.evaluation import multiple_choice
from gptfast.evaluation.multiple_choice import Question, Row
from gptfast.evaluation.token_losses import losses
from gptfast.tokenizers import ByteTokenizer, CharTokenizer, TiktokenTokenizer, Tokenizer, WordTokenizer
from tests.support.likelihood import exact_log_probabilities

QUESTION = {"ctx": "The cat", "endings": ["sat", "flew"], "label": 1, "activity_label": "Cats"}


def written(folder: Path, *lines: object) -> Path:
    path = folder / "choices.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_what_a_file_holds(tmp_path):
    path = written(
        tmp_path, QUESTION, "", {"context": "Zürich", "ctx": "no", "endings": [" 東", "b", "c"], "label": "2"}
    )
    first, second = Question("The cat", ("sat", "flew"), 1), Question("Zürich", (" 東", "b", "c"), 2)
    assert multiple_choice.read(path) == [first, second]
    assert multiple_choice.read(path, limit=2) == [first, second]
    assert multiple_choice.read(path, limit=1) == [first]


def test_what_comes_after_the_limit_is_not_read(tmp_path):
    assert len(multiple_choice.read(written(tmp_path, QUESTION, "damaged"), limit=1)) == 1


def without(field: str) -> dict:
    return {name: value for name, value in QUESTION.items() if name != field}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"ctx": "The cat", "endings": [', "not JSON: Expecting value"),
        ("[1, 2]", "a JSON object is needed, got list"),
        (without("ctx"), "no text in the field 'context' or 'ctx'; there is: endings, label, activity_label"),
        (QUESTION | {"ctx": 3}, "no text in the field 'context' or 'ctx'"),
        (without("endings"), "'endings' must be at least two texts that are not empty, got null"),
        (QUESTION | {"endings": []}, r"'endings' must be at least two texts that are not empty, got \[\]"),
        (QUESTION | {"endings": ["one"]}, "'endings' must be at least two texts"),
        (QUESTION | {"endings": ["one", ""]}, "'endings' must be at least two texts"),
        (QUESTION | {"endings": ["one", 2]}, "'endings' must be at least two texts"),
        (QUESTION | {"endings": "ab"}, "'endings' must be at least two texts"),
        (QUESTION | {"label": 2}, "'label' must be a number from 0 to 1, got 2"),
        (QUESTION | {"label": -1}, "'label' must be a number from 0 to 1, got -1"),
        (QUESTION | {"label": "-1"}, "'label' must be a number from 0 to 1, got \"-1\""),
        (QUESTION | {"label": ""}, "'label' must be a number from 0 to 1, got \"\""),
        (QUESTION | {"label": True}, "'label' must be a number from 0 to 1, got true"),
        (QUESTION | {"label": 1.0}, "'label' must be a number from 0 to 1, got 1.0"),
        (without("label"), "'label' must be a number from 0 to 1, got null"),
    ],
)
def test_lines_that_are_no_questions(tmp_path, line, message: str):
    path = written(tmp_path, QUESTION, "", line)
    with pytest.raises(ValueError, match=f"{path}, line 3: {message}") as found:
        multiple_choice.read(path)
    assert "\n" not in str(found.value)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "choices.jsonl"
    path.write_bytes(b'{"ctx": "\xff"}\n')
    with pytest.raises(ValueError, match=r"line 1: not JSON: 'utf-8' codec can't decode byte"):
        multiple_choice.read(path)


def test_files_without_questions(tmp_path):
    with pytest.raises(ValueError, match=r"no such file with choices: .*none.jsonl"):
        multiple_choice.read(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="no such file with choices"):
        multiple_choice.read(tmp_path)
    with pytest.raises(ValueError, match=r"choices.jsonl has no questions"):
        multiple_choice.read(written(tmp_path, "", " "))


def encoding() -> Tokenizer:
    """Byte pairs that join a space with what follows it, and two of the characters that an ending may begin with."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b" t": 256, b"ab": 257, b"\n\n": 258}
    special = {"<|endoftext|>": 259}
    return TiktokenTokenizer(
        tiktoken.Encoding("gpt2", pat_str=r" ?\S+|\s+", mergeable_ranks=ranks, special_tokens=special)
    )


def test_text_is_tokenized_as_a_whole():
    tokenizer = encoding()
    assert multiple_choice.encode(tokenizer, "xa", "bc", 20, delimiter="") == Row([*b"x", 97, *b"c"], 1)
    assert tokenizer.encode("xabc").tolist() == [*b"x", 257, *b"c"]  # two tokens are the context's by itself
    assert multiple_choice.encode(tokenizer, "x", "tea", 20) == Row([*b"x", 256, *b"ea"], 3)


@pytest.mark.parametrize(("context", "ending"), [("x", "tea"), ("x ", "tea"), ("x", " tea")])
def test_space_between_goes_with_the_ending(context: str, ending: str):
    assert multiple_choice.encode(encoding(), context, ending, 20) == Row([*b"x", 256, *b"ea"], 3)


def test_space_that_is_there_stays_as_it_is():
    assert multiple_choice.encode(encoding(), "x\n\n", "y", 20) == Row([*b"x", 258, *b"y"], 2)
    assert multiple_choice.encode(encoding(), "x  ", " y", 20) == Row([*b"x", *b"   y"], 4)
    assert multiple_choice.encode(encoding(), "x", "\ny", 20) == Row([*b"x", *b"\ny"], 2)


def test_the_delimiter():
    assert multiple_choice.encode(ByteTokenizer(), "x", "y", 20, delimiter="") == Row([*b"xy"], 1)
    assert multiple_choice.encode(ByteTokenizer(), "x", "y", 20, delimiter=": ") == Row([*b"x: y"], 3)
    assert multiple_choice.encode(ByteTokenizer(), "x ", "y", 20, delimiter=": ") == Row([*b"x y"], 2)


@pytest.mark.parametrize(("context", "after"), [("", b" y"), (" ", b" y"), ("\n", b"\ny")])
def test_an_empty_context_is_the_end_of_a_document(context: str, after: bytes):
    assert multiple_choice.encode(ByteTokenizer(), context, "y", 20) == Row([256, *after], 2)
    assert multiple_choice.encode(encoding(), context, "y", 20) == Row([259, *after], 2)


def test_an_empty_context_that_nothing_stands_for():
    with pytest.raises(ValueError, match="the context is empty, and the tokenizer has no end of text"):
        multiple_choice.encode(CharTokenizer(" xy"), "", "y", 20)
    assert multiple_choice.encode(CharTokenizer(" xy", end_of_text=True), "", "y", 20) == Row([3, 0, 2], 2)


def test_an_ending_without_tokens():
    with pytest.raises(ValueError, match=r"the ending ' ' has no tokens of its own after 'a word'"):
        multiple_choice.encode(WordTokenizer(["a", "word"]), "a word", " ", 20)


def test_an_ending_that_becomes_a_part_of_the_context():
    with pytest.raises(ValueError, match="the ending 'b' has no tokens of its own after 'xa'"):
        multiple_choice.encode(encoding(), "xa", "b", 20, delimiter="")


@pytest.mark.parametrize(
    ("length", "ids", "asked"),
    [
        (9, b"abcdefghij", 4),
        (8, b"bcdefghij", 4),
        (5, b"efghij", 4),
        (4, b"fghij", 4),  # one of the context is read
        (3, b"ghij", 3),  # the first of the ending is read, and nothing predicts it
        (1, b"ij", 1),
    ],
)
def test_what_is_longer_than_the_window_keeps_its_end(length: int, ids: bytes, asked: int):
    found = multiple_choice.encode(ByteTokenizer(), "abcdef", "ghij", length, delimiter="")
    assert found == Row([*ids], asked)
    assert len(found.ids) <= length + 1
    assert found.asked < len(found.ids)


def build(vocab_size: int = 257, block_size: int = 16) -> GPT:
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "init_std": 0.3}
    return GPT(GPTConfig(vocab_size=vocab_size, block_size=block_size, **shape), "eager")


def some_rows() -> list[Row]:
    generator = np.random.default_rng(3)
    lengths = [2, 17, 9, 5, 17, 3, 12]
    return [Row(generator.integers(257, size=n).tolist(), int(generator.integers(1, n))) for n in lengths]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_likelihoods_are_those_of_a_float64_loop(batch_size: int):
    model, rows = build(), some_rows()
    found = multiple_choice.log_likelihoods(model, rows, torch.float32, batch_size)
    expected = [sum(exact_log_probabilities(model, row.ids)[-row.asked :]) for row in rows]
    assert found.dtype == np.float64
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_longest_rows_go_first_and_batches_are_no_wider_than_they_need(monkeypatch):
    shapes = []
    monkeypatch.setattr(
        multiple_choice,
        "losses",
        lambda model, idx, *rest: shapes.append(tuple(idx.shape)) or losses(model, idx, *rest),
    )
    multiple_choice.log_likelihoods(build(), some_rows(), torch.float32, 3)
    assert shapes == [(3, 16), (3, 8), (1, 1)]


def harness_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """lm-evaluation-harness, `TemplateLM._encode_pair`, of a context that is not empty."""
    spaces = len(context) - len(context.rstrip())
    if spaces > 0:
        continuation = context[-spaces:] + continuation
        context = context[:-spaces]
    whole, before = tokenizer.encode(context + continuation).tolist(), tokenizer.encode(context).tolist()
    return before, whole[len(before) :]


def test_the_answers_are_those_of_transformers(tmp_path):
    """GPT-2 of Hugging Face's by the harness's rules, one ending at a time, in float64."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": 260, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, initializer_range=0.3))
    theirs.save_pretrained(tmp_path)
    theirs.double().eval()
    model, tokenizer = GPT.from_pretrained(str(tmp_path), backend="eager"), encoding()
    generator = np.random.default_rng(4)
    words = ["tea", "the", "ab", "Zürich", "東京", "ééé", "cat", "."]

    def text(longest: int) -> str:
        return " ".join(generator.choice(words, size=generator.integers(1, longest)))

    questions = [Question(text(9), tuple(text(6) for _ in range(4)), number % 4) for number in range(20)]
    expected: dict[str, list[bool]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
    cut = 0
    for question in questions:
        sums = []
        for ending in question.endings:
            before, after = harness_pair(tokenizer, question.context, " " + ending)
            kept = torch.tensor([(before + after)[-25:]])
            cut += len(before + after) > 25
            with torch.no_grad():
                chances = theirs(kept[:, :-1]).logits.log_softmax(-1)[0]  # [T, V]
            sums.append(chances.gather(1, kept[0, 1:, None])[-len(after) :].sum().item())
        rows = [multiple_choice.encode(tokenizer, question.context, ending, 24) for ending in question.endings]
        assert multiple_choice.log_likelihoods(model, rows, torch.float32, 3) == pytest.approx(sums, rel=1e-5)
        sizes = {
            "acc": [1] * 4,
            "acc_norm": [len(ending) for ending in question.endings],
            "acc_bytes": [len(ending.encode()) for ending in question.endings],
        }
        for name, size in sizes.items():
            expected[name].append(int(np.argmax(np.array(sums) / size)) == question.label)
    assert cut > 3
    found = multiple_choice.score(model, tokenizer, questions, torch.float32, 5)
    for name, right in expected.items():
        assert getattr(found, name).value == pytest.approx(np.mean(right)), name
        assert getattr(found, name).stderr == pytest.approx(np.std(right, ddof=1) / math.sqrt(20)), name
    assert len({tuple(right) for right in expected.values()}) == 3, "the measures should differ"


def answers(monkeypatch, questions: list[Question], likelihoods: list[float]) -> tuple[float, float, float]:
    monkeypatch.setattr(multiple_choice, "log_likelihoods", lambda *arguments: np.array(likelihoods))
    found = multiple_choice.score(build(), ByteTokenizer(), questions, torch.float32, 8)
    assert found.questions == len(questions)
    return found.acc.value, found.acc_norm.value, found.acc_bytes.value


def test_length_counts_in_characters_or_bytes(monkeypatch):
    """-2, -2.9 and -1.75 for each character, -1, -1.45 and -1.75 for each byte."""
    likelihoods = [-4.0, -5.8, -7.0]
    endings = ("üü", "öö", "abcd")
    assert answers(monkeypatch, [Question("x", endings, 0)], likelihoods) == (1, 0, 1)
    assert answers(monkeypatch, [Question("x", endings, 2)], likelihoods) == (0, 1, 0)


def test_questions_with_different_numbers_of_endings(monkeypatch):
    questions = [Question("x", ("a", "b"), 1), Question("x", ("a", "b", "c"), 0), Question("x", ("a", "b"), 0)]
    assert answers(monkeypatch, questions, [-2, -1, -1, -2, -3, -5, -4])[0] == pytest.approx(2 / 3)


def test_of_equals_the_first_is_taken(monkeypatch):
    assert answers(monkeypatch, [Question("x", ("a", "b"), 0)], [-1, -1])[0] == 1
    assert answers(monkeypatch, [Question("x", ("a", "b"), 1)], [-1, -1])[0] == 0


def test_a_model_that_has_learned_the_answers():
    model, tokenizer = build(), ByteTokenizer()
    ids = torch.tensor([[*b"to be or not to b"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(ids[:, :-1], ids[:, 1:])[1].backward()
        optimizer.step()
    questions = [Question("to be or", ("not to", "to not", "two"), 0), Question("to be", ("xx", "or"), 1)]
    found = multiple_choice.score(model, tokenizer, questions, torch.float32, 2)
    assert (found.acc.value, found.acc_norm.value, found.acc_bytes.value) == (1, 1, 1)


def test_text_that_the_tokenizer_lacks():
    questions = [Question("ab", ("a", "b"), 0), Question("ab", ("a", "Z"), 0)]
    with pytest.raises(ValueError, match=r"question 2: the tokenizer lacks the characters 'Z'; accepted: the 3 of its"):
        multiple_choice.score(build(3), CharTokenizer(" ab"), questions, torch.float32, 8)


def test_progress():
    class Bar:
        done = 0

        def update(self, number: int) -> None:
            self.done += number

    bar = Bar()
    multiple_choice.log_likelihoods(build(), some_rows(), torch.float32, 3, bar)
    assert bar.done == 7
