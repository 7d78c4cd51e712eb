"""The pieces of a text stream add up to the decoded text, up to the first stop string."""

import itertools
import re

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from gptfast.generation.detokenizer import TextStream
from gptfast.tokenizers import ByteTokenizer, CharTokenizer, TiktokenTokenizer, WordTokenizer
from gptfast.tokenizers.byte import END_OF_TEXT

TEXT = "Zürich, (naïve) [x]! don't 東京 \U0001f600\U0001f468\u200d\U0001f469 ab abc aab\ufffd\n\ttabs"


def small_encoding() -> tiktoken.Encoding:
    """The 256 bytes, and merges that end inside a character or span two."""
    merges = [b"th", b"ab", b"\xf0\x9f", b"\x98\x80", b"\xe6\x9d", b"\xb1\xe4", b"\xba\xac"]
    ranks = {bytes([byte]): byte for byte in range(256)} | {merge: 256 + rank for rank, merge in enumerate(merges)}
    return tiktoken.Encoding("small", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 263})


ALL = {
    "char": CharTokenizer.of_documents([TEXT], end_of_text=True),
    "surrogates": CharTokenizer("a\ud83d\ude00é", end_of_text=True),
    "byte": ByteTokenizer(),
    "word": WordTokenizer.of_documents([TEXT]),
    "odd words": WordTokenizer(["", " ", "(", ")", ".", " a", "a ", "( ", " .", "\ud83d", "\ufffd"]),
    "tiktoken": TiktokenTokenizer(small_encoding()),
}


def cut(text: str, stop: list[str]) -> str:
    """`text` before the stop string that ends first, of those that end together the longest."""
    for end in range(len(text) + 1):
        for candidate in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(candidate):
                return text[: end - len(candidate)]
    return text


def streamed(stream: TextStream, ids: list[int]) -> list[str]:
    return [*map(stream.push, ids), stream.flush()]


def tokens(tokenizer) -> st.SearchStrategy[list[int]]:
    """Any ids, and ids of texts, which have more whole characters."""
    some = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30)
    if isinstance(tokenizer, CharTokenizer | WordTokenizer):
        return some
    texts = st.text(st.sampled_from("ab th東京\U0001f600é\ufffd"), max_size=15) | st.text(max_size=15)
    return some | texts.map(lambda text: tokenizer.encode(text).tolist())


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
def test_pieces_add_up_to_the_text_before_the_first_stop_string(name, data):
    tokenizer = ALL[name]
    ids = data.draw(tokens(tokenizer))
    text = tokenizer.decode(ids)
    parts = st.tuples(st.integers(0, max(0, len(text) - 1)), st.integers(1, 6))
    inside = parts.map(lambda part: text[part[0] :][: part[1]]).filter(bool) if text else st.just("a")
    near = inside.map(lambda part: part[:-1] + "b")  # a prefix of it occurs
    stop = data.draw(
        st.lists(inside | near | st.text(st.sampled_from("ab\ufffd é"), min_size=1, max_size=3), max_size=3)
    )
    stream = TextStream(tokenizer, stop)
    pieces = streamed(stream, ids)
    expected = cut(text, stop)
    assert "".join(pieces) == expected
    assert stream.finished == any(part in text for part in stop)


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
def test_text_is_held_back_only_while_it_can_change(name, data):
    """After each token, only an unfinished character and a possible beginning of a stop string are held back."""
    tokenizer = ALL[name]
    ids = data.draw(tokens(tokenizer))
    stop = data.draw(st.lists(st.text(st.sampled_from("ab. \ufffdé"), min_size=1, max_size=4), max_size=2))
    stream = TextStream(tokenizer, stop)
    out = ""
    for count, token in enumerate(ids, start=1):
        out += stream.push(token)
        if stream.finished:
            return
        if isinstance(tokenizer, CharTokenizer | WordTokenizer):
            certain = tokenizer.decode(ids[:count])
        else:
            certain = whole_characters(tokenizer.decode_bytes(ids[:count]))
        begun = [stop_string[:size] for stop_string in stop for size in range(1, len(stop_string))]
        held = max((part for part in begun if certain.endswith(part)), key=len, default="")
        assert out == certain[: len(certain) - len(held)]


def whole_characters(content: bytes) -> str:
    """Text of bytes, without a character that more bytes could finish."""
    for unfinished in range(3, 0, -1):
        end = content[-unfinished:]
        if len(end) == unfinished and could_be_finished(end):
            return content[:-unfinished].decode("utf-8", "replace")
    return content.decode("utf-8", "replace")


def could_be_finished(begun: bytes) -> bool:
    # a continuation byte from each quarter of their range, because the second byte's range depends on the first;
    # Python's decoder waits for the end of surrogates too
    for size in range(1, 4):
        for more in itertools.product((0x80, 0x90, 0xA0, 0xBF), repeat=size):
            try:
                return len((begun + bytes(more)).decode("utf-8", "surrogatepass")) == 1
            except UnicodeDecodeError:
                continue
    return False


def test_characters_are_not_split():
    ids = ByteTokenizer().encode("é\U0001f600x").tolist()
    assert streamed(TextStream(ByteTokenizer()), ids) == ["", "é", "", "", "", "\U0001f600", "x", ""]
    small = ALL["tiktoken"]
    ids = small.encode("東京").tolist()
    assert [small.decode_bytes([token]) for token in ids] == [b"\xe6\x9d", b"\xb1\xe4", b"\xba\xac"]
    assert streamed(TextStream(small), ids) == ["", "東", "京", ""]


def test_invalid_utf_8_is_replaced():
    stream = TextStream(ByteTokenizer())
    # 0xff begins no character, "a" cannot follow 0xe6, and the last character is unfinished
    assert streamed(stream, [0xFF, 0xE6, 0x9D, ord("a"), 0xE6, 0x9D]) == ["\ufffd", "", "", "\ufffda", "", "", "\ufffd"]
    assert not stream.finished


def test_a_stop_string_may_span_tokens():
    chars = CharTokenizer("abc\n")
    stream = TextStream(chars, ["\n\n", "cab"])
    assert [stream.push(token) for token in chars.encode("a\nbca\n\nb")] == ["a", "", "\nb", "", "", "ca", "", ""]
    assert stream.finished
    assert stream.push(0) == ""
    assert stream.flush() == stream.flush() == ""


def test_flush_releases_the_beginning_of_a_stop_string():
    chars = CharTokenizer("abc")
    stream = TextStream(chars, ["abc"])
    assert streamed(stream, chars.encode("aab").tolist()) == ["", "a", "", "ab"]
    assert not stream.finished
    assert stream.flush() == ""


@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        (["abcd", "bc"], "abcd", "a"),  # the one that ends first
        (["bc", "abc"], "abc", ""),  # of two that end together the longer
        (["aab"], "aaab", "a"),
        (["abab"], "aabab", "a"),
        (["b", "a"], "cab", "c"),
    ],
)
def test_the_first_stop_string_is_independent_of_token_boundaries(stop, text, expected):
    words = CharTokenizer("abcd"), WordTokenizer([text])
    for tokenizer in words:
        ids = tokenizer.encode(text).tolist()
        stream = TextStream(tokenizer, stop)
        assert "".join(streamed(stream, ids)) == expected
        assert stream.finished


def test_each_token_is_decoded_once_with_the_one_before_it(monkeypatch):
    decoded = []
    monkeypatch.setattr(ByteTokenizer, "decode_bytes", lambda self, ids: decoded.append(len(ids)) or bytes(ids))
    stream = TextStream(ByteTokenizer(), ["\ufffd" * 5 + "a"])
    for _ in range(200):
        stream.push(0x80)
    assert max(decoded) == 2
    assert len(decoded) == 400


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ([""], "stop strings must be strings of at least one character, got ''"),
        (["a", 3], "stop strings must be strings of at least one character, got 3"),
        ("ab", "stop must be a sequence of strings, got 'ab'; accepted: ['ab']"),
    ],
)
def test_stop_strings_that_cannot_be_used_are_refused(stop, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TextStream(ByteTokenizer(), stop)


def test_tokens_out_of_range_or_after_the_end_are_refused():
    stream = TextStream(CharTokenizer("ab"))
    for token in (-1, 2):
        with pytest.raises(ValueError, match=f"token {token} is out of range; accepted: 0 to 1"):
            stream.push(token)
    assert stream.push(1) == "b"
    stream.flush()
    with pytest.raises(ValueError, match=r"flush\(\)"):
        stream.push(0)
