"""Multiple choice: files, tokens of an ending, log-likelihoods and answers. `test_exported.py` has the harness."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gptfast import GPT, GPTConfig
from gptfast.evaluation import multiple_choice
from gptfast.evaluation.multiple_choice import EncodedEnding, Question
from gptfast.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, WordTokenizer
from tests.support.likelihood import exact_log_probabilities
from tests.support.small_tokenizers import small_tiktoken

QUESTION = {"ctx": "The cat", "endings": ["sat", "flew"], "label": 1, "activity_label": "Cats"}
BYTES = ByteTokenizer()
PAIRS = small_tiktoken(b" t", b"ab", b"\n\n")  # 256, 257, 258, and 259 ends a text


def write(folder: Path, *lines: object) -> Path:
    path = folder / "choices.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_read_takes_both_names_of_the_context(tmp_path):
    path = write(tmp_path, QUESTION, "", {"context": "Zürich", "ctx": "no", "endings": [" 東", "b", "c"], "label": "2"})
    first, second = Question("The cat", ("sat", "flew"), 1), Question("Zürich", (" 東", "b", "c"), 2)
    assert multiple_choice.read(path) == multiple_choice.read(path, limit=2) == [first, second]
    assert multiple_choice.read(path, limit=1) == [first]


def test_read_stops_at_the_limit(tmp_path):
    assert len(multiple_choice.read(write(tmp_path, QUESTION, "damaged"), limit=1)) == 1


def without(field: str) -> dict:
    return {name: value for name, value in QUESTION.items() if name != field}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"ctx": "The cat", "endings": [', "not JSON"),
        ("[1, 2]", "JSON object.* list"),
        (without("ctx"), "'context' or 'ctx'.* endings, label, activity_label"),
        (QUESTION | {"ctx": 3}, "'context' or 'ctx'"),
        (without("endings"), "'endings'.* null"),
        (QUESTION | {"endings": []}, r"'endings'.* \[\]"),
        (QUESTION | {"endings": ["one"]}, "'endings'"),
        (QUESTION | {"endings": ["one", ""]}, "'endings'"),
        (QUESTION | {"endings": ["one", 2]}, "'endings'"),
        (QUESTION | {"endings": "ab"}, "'endings'"),
        (QUESTION | {"label": 2}, "'label'.* 0 to 1, got 2"),
        (QUESTION | {"label": -1}, "'label'.* 0 to 1, got -1"),
        (QUESTION | {"label": "-1"}, "'label'.* got \"-1\""),
        (QUESTION | {"label": ""}, "'label'.* got \"\""),
        (QUESTION | {"label": True}, "'label'.* got true"),
        (QUESTION | {"label": 1.0}, "'label'.* got 1.0"),
        (without("label"), "'label'.* got null"),
    ],
)
def test_read_rejects_a_line(tmp_path, line, message: str):
    path = write(tmp_path, QUESTION, "", line)
    with pytest.raises(ValueError, match=f"{path}, line 3: .*{message}") as found:
        multiple_choice.read(path)
    assert "\n" not in str(found.value)


def test_read_rejects_files_without_questions(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(ValueError, match=f"no such file.* {path}"):
            multiple_choice.read(path)
    with pytest.raises(ValueError, match=r"choices.jsonl has no questions"):
        multiple_choice.read(write(tmp_path, "", " "))
    (tmp_path / "choices.jsonl").write_bytes(b'{"ctx": "\xff"}\n')
    with pytest.raises(ValueError, match=r"line 1: .*utf-8"):
        multiple_choice.read(tmp_path / "choices.jsonl")


@pytest.mark.parametrize(
    ("tokenizer", "context", "ending", "delimiter", "ids", "n_targets"),
    [
        # tokenized as one text, though "ab" is one token: the context alone has two
        (PAIRS, "xa", "bc", "", [*b"x", 97, *b"c"], 1),
        # white space between goes with the ending
        (PAIRS, "x", "tea", " ", [*b"x", 256, *b"ea"], 3),
        (PAIRS, "x ", "tea", " ", [*b"x", 256, *b"ea"], 3),
        (PAIRS, "x", " tea", " ", [*b"x", 256, *b"ea"], 3),
        # and stays what it is
        (PAIRS, "x\n\n", "y", " ", [*b"x", 258, *b"y"], 2),
        (PAIRS, "x  ", " y", " ", [*b"x   y"], 4),
        (PAIRS, "x", "\ny", " ", [*b"x\ny"], 2),
        # the delimiter is inserted only where there is none
        (BYTES, "x", "y", "", [*b"xy"], 1),
        (BYTES, "x", "y", ": ", [*b"x: y"], 3),
        (BYTES, "x ", "y", ": ", [*b"x y"], 2),
        # an empty context is an end of text
        (BYTES, "", "y", " ", [256, *b" y"], 2),
        (BYTES, " ", "y", " ", [256, *b" y"], 2),
        (BYTES, "\n", "y", " ", [256, *b"\ny"], 2),
        (PAIRS, "", "y", " ", [259, *b" y"], 2),
        (CharTokenizer(" xy", end_of_text=True), "", "y", " ", [3, 0, 2], 2),
    ],
)
def test_encode(tokenizer: Tokenizer, context: str, ending: str, delimiter: str, ids: list[int], n_targets: int):
    assert multiple_choice.encode(tokenizer, context, ending, 20, delimiter) == EncodedEnding(ids, n_targets)


@pytest.mark.parametrize(
    ("tokenizer", "context", "ending", "message"),
    [
        (CharTokenizer(" xy"), "", "y", "context is empty.* end-of-text"),
        (WordTokenizer(["a", "word"]), "a word", " ", "ending ' ' .* 'a word'"),
        (PAIRS, "xa", "b", "ending 'b' .* 'xa'"),  # it becomes a part of the context
    ],
)
def test_encode_rejects(tokenizer: Tokenizer, context: str, ending: str, message: str):
    with pytest.raises(ValueError, match=message):
        multiple_choice.encode(tokenizer, context, ending, 20, delimiter="")


@pytest.mark.parametrize(
    ("block_size", "ids", "n_targets"),
    [
        (9, b"abcdefghij", 4),
        (8, b"bcdefghij", 4),
        (5, b"efghij", 4),
        (4, b"fghij", 4),  # the context keeps one token
        (3, b"ghij", 3),  # the ending's first token is only read
        (1, b"ij", 1),
    ],
)
def test_encode_truncates_on_the_left(block_size: int, ids: bytes, n_targets: int):
    found = multiple_choice.encode(BYTES, "abcdef", "ghij", block_size, delimiter="")
    assert found == EncodedEnding([*ids], n_targets)


def build(vocab_size: int = 257, block_size: int = 16) -> GPT:
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "init_std": 0.3}
    return GPT(GPTConfig(vocab_size=vocab_size, block_size=block_size, **shape), "eager")


def some_endings() -> list[EncodedEnding]:
    generator = np.random.default_rng(3)
    lengths = [2, 17, 9, 5, 17, 3, 12]
    return [EncodedEnding(generator.integers(257, size=n).tolist(), int(generator.integers(1, n))) for n in lengths]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_log_likelihoods_are_those_of_a_float64_loop(batch_size: int):
    model, endings = build(), some_endings()
    found = multiple_choice.log_likelihoods(model, endings, torch.float32, batch_size)
    expected = [sum(exact_log_probabilities(model, ending.ids)[-ending.n_targets :]) for ending in endings]
    assert found.dtype == np.float64
    assert found == pytest.approx(expected, rel=1e-5)


def test_log_likelihoods_batch_by_length():
    model, shapes = build(), []
    model.transformer.wte.register_forward_hook(lambda wte, given, x: shapes.append(tuple(given[0].shape)))
    multiple_choice.log_likelihoods(model, some_endings(), torch.float32, 3)
    assert shapes == [(3, 16), (3, 8), (1, 1)]


@pytest.mark.parametrize(
    ("questions", "log_likelihoods", "accuracies"),
    [
        # -2, -2.9 and -1.75 per character, -1, -1.45 and -1.75 per byte
        ([Question("x", ("üü", "öö", "abcd"), 0)], [-4.0, -5.8, -7.0], (1, 0, 1)),
        ([Question("x", ("üü", "öö", "abcd"), 2)], [-4.0, -5.8, -7.0], (0, 1, 0)),
        # questions with different numbers of endings
        (
            [Question("x", ("a", "b"), 1), Question("x", ("a", "b", "c"), 0), Question("x", ("a", "b"), 0)],
            [-2, -1, -1, -2, -3, -5, -4],
            (2 / 3,) * 3,
        ),
        # the first of equals is the answer
        ([Question("x", ("a", "b"), 0)], [-1, -1], (1, 1, 1)),
        ([Question("x", ("a", "b"), 1)], [-1, -1], (0, 0, 0)),
    ],
)
def test_score_of_given_log_likelihoods(
    monkeypatch, questions: list[Question], log_likelihoods: list, accuracies: tuple
):
    monkeypatch.setattr(multiple_choice, "log_likelihoods", lambda *arguments: np.array(log_likelihoods))
    found = multiple_choice.score(build(), BYTES, questions, torch.float32, 8)
    assert found.questions == len(questions)
    assert (found.acc.value, found.acc_norm.value, found.acc_bytes.value) == pytest.approx(accuracies)


def test_score_names_the_question_that_it_rejects():
    questions = [Question("ab", ("a", "b"), 0), Question("ab", ("a", "Z"), 0)]
    with pytest.raises(ValueError, match=r"question 2: .*'Z'"):
        multiple_choice.score(build(3), CharTokenizer(" ab"), questions, torch.float32, 8)
