"""Texts are continued together as each alone, in pieces that add up to the whole."""

from __future__ import annotations

import pytest
import torch

from gptfast.generation import text as texts
from gptfast.generation.beam_search import BeamSearch
from gptfast.generation.sampling import Sampling
from gptfast.generation.text import Text
from gptfast.tokenizers import ByteTokenizer, CharTokenizer, WordTokenizer
from tests.support.generation import GREEDY, generator, gpt
from tests.support.oracle import DEVICE


def test_streamed_pieces_add_up_to_the_text():
    tokenizer = ByteTokenizer()
    model = gpt(vocab_size=tokenizer.vocab_size)
    pieces = [piece for _, piece in texts.stream(model, tokenizer, [Text("Zürich")], 60, generator=generator())]
    text = texts.generate_text(model, tokenizer, "Zürich", 60, generator=generator())
    assert len(pieces) > 1
    assert "".join(pieces) == text
    ids = tokenizer.encode("Zürich")[None]
    written = model.generate(torch.from_numpy(ids).to(DEVICE), 60, stop_tokens=[256], generator=generator())[
        0, len(ids[0]) :
    ]
    kept = [token for token in written.tolist() if token != 256]
    assert text == tokenizer.decode(kept)


def test_text_ends_before_a_stop_string():
    tokenizer = CharTokenizer("abcde")
    model = gpt(vocab_size=tokenizer.vocab_size)
    free = texts.generate_text(model, tokenizer, "a", 40, generator=generator())
    stop = free[10:12]
    text = texts.generate_text(model, tokenizer, "a", 40, stop=[stop], generator=generator())
    assert text == free[: free.index(stop)]


def test_a_prompt_without_tokens_is_the_end_of_text_token_or_refused():
    model = gpt(vocab_size=3)
    with pytest.raises(ValueError, match="the prompt '' has no tokens; give at least one character"):
        texts.generate_text(model, CharTokenizer("abc"), "", 5)
    words = WordTokenizer(["a", "b", "."])
    model = gpt(vocab_size=words.vocab_size)
    assert texts.generate_text(model, words, "\n ", 5, GREEDY) == texts.generate_text(model, words, "", 5, GREEDY)


def test_prompts_of_any_lengths_are_continued_as_each_alone():
    tokenizer = CharTokenizer("abcde")
    model = gpt(vocab_size=tokenizer.vocab_size)
    together = [Text("a"), Text("bcd"), Text("ce")]
    pieces = list(texts.stream(model, tokenizer, together, 12, GREEDY, stop=["aa", "ebe"]))
    for row, text in enumerate(together):
        alone = Text(text.prompt)
        list(texts.stream(model, tokenizer, [alone], 12, GREEDY, stop=["aa", "ebe"]))
        assert (text.text, text.tokens, text.finished) == (alone.text, alone.tokens, alone.finished)
        assert "".join(piece for number, piece in pieces if number == row) == text.text
        assert len(text.log_probs) == len(text.tokens)


def test_words_are_separated_by_a_space():
    """Between prompt and continuation too."""
    tokenizer = WordTokenizer(["the", "quick", "brown", "fox", "."])
    model = gpt(vocab_size=tokenizer.vocab_size)
    text = Text("the quick")
    list(texts.stream(model, tokenizer, [text], 8, GREEDY))
    ids = tokenizer.encode("the quick").tolist()
    kept = [token for token in text.tokens if token != tokenizer.end_of_text]
    assert "the quick" + text.text == tokenizer.decode(ids + kept)
    assert text.text[0] in " ."


def test_the_end_of_text_token_ends_a_text_and_adds_none():
    tokenizer = ByteTokenizer()
    model = gpt(vocab_size=tokenizer.vocab_size)
    found = [Text("a") for _ in range(20)]
    list(texts.stream(model, tokenizer, found, 200, generator=generator()))
    assert 0 < sum(text.finished for text in found) < 20
    for text in found:
        assert text.finished is (256 in text.tokens)
        assert 256 not in text.tokens[:-1]
        assert text.text == tokenizer.decode([token for token in text.tokens if token != 256])


def test_beam_search_gives_texts_with_scores():
    tokenizer = ByteTokenizer()
    model = gpt(vocab_size=tokenizer.vocab_size)
    found = texts.search(model, tokenizer, ["Zürich", "a"], 12, BeamSearch(3, num_return_sequences=2))
    assert [text.prompt for text in found] == ["Zürich", "Zürich", "a", "a"]
    for text in found:
        kept = [token for token in text.tokens if token != tokenizer.end_of_text]
        assert text.text == tokenizer.decode(kept)
        assert text.finished == (text.tokens[-1] == tokenizer.end_of_text)
    assert found[0].score >= found[1].score
    idx = torch.from_numpy(tokenizer.encode("a")[None]).to(DEVICE)
    ids = model.generate(idx, 12, num_beams=3, stop_tokens=[tokenizer.end_of_text])[0, 1:].tolist()
    assert found[2].tokens == ids[: len(found[2].tokens)]
    penalized = texts.search(model, tokenizer, ["a"], 12, BeamSearch(3), Sampling(no_repeat_ngram_size=1))
    assert len(set(penalized[0].tokens)) == len(penalized[0].tokens) > 1
