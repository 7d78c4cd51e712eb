import re
import sys
from collections import Counter
from itertools import pairwise
from unicodedata import category

import pytest
import tiktoken
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from gptfast import GPT, GPTConfig
from gptfast.huggingface import tokenizer
from gptfast.tokenizers import ByteTokenizer, CharTokenizer, TiktokenTokenizer, Tokenizer, WordTokenizer
from gptfast.tokenizers.byte import END_OF_TEXT

TEXT = """\
Zürich's naïve façade (東京) costs 1234567 or 12 — "isn't it?", they'll say.  It\u2019s  \u0301odd\u2029½ %[x] {y}!\r\n
\tdef encode(self, text: str) -> list[int]:\n        return [self.ids[word] for word in text.split()]\n\n
a <unk> and an <|endoftext|> \U0001f600\U0001f600\x00\x1c\x85 the then there these the the them THE'S DON'T
"""
GAP = 5  # between the last rank and the first special token, as in cl100k_base


def merged(piece: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    found, i = [], 0
    while i < len(piece):
        together = tuple(piece[i : i + 2]) == pair
        found.append(piece[i] + piece[i + 1] if together else piece[i])
        i += 2 if together else 1
    return found


def trained(merges: int) -> dict[bytes, int]:
    """Train a byte-pair encoding of TEXT and return its ranks, with the bytes shuffled as in GPT-2."""
    ranks = {bytes([byte]): (37 * byte + 11) % 256 for byte in range(256)}
    pieces = [[bytes([byte]) for byte in piece.encode()] for piece in re.findall(r"\s?\S+|\s+", TEXT)]
    for _ in range(merges):
        counts = Counter(pair for piece in pieces for pair in pairwise(piece) if pair[0] + pair[1] not in ranks)
        best = max(counts, key=lambda pair: (counts[pair], pair))
        ranks[best[0] + best[1]] = len(ranks)
        pieces = [merged(piece, best) for piece in pieces]
    return ranks


RANKS = trained(120)


def pattern(name: str) -> str:
    """Return the pattern of a tiktoken encoding, without downloading its vocabulary."""
    with pytest.MonkeyPatch.context() as patched:
        for function in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
            patched.setattr(openai_public, function, lambda *arguments, **options: {})
        return openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"]


def byte_pairs(name: str) -> TiktokenTokenizer:
    special = {END_OF_TEXT: len(RANKS) + GAP, "<|fim|>": len(RANKS) + GAP + 3}
    return TiktokenTokenizer(
        tiktoken.Encoding(name, pat_str=pattern(name), mergeable_ranks=RANKS, special_tokens=special)
    )


OURS: dict[str, Tokenizer] = {
    "char": CharTokenizer.of_documents([TEXT], end_of_text=True),
    "char without an end": CharTokenizer.of_documents([TEXT]),
    "byte": ByteTokenizer(),
    "word": WordTokenizer.of_documents([TEXT]),
    **{name: byte_pairs(name) for name in openai_public.ENCODING_CONSTRUCTORS},
}
ASSIGNED = st.characters(exclude_categories=("Cs", "Cn"))
ANY_TEXT = st.lists(st.sampled_from(re.findall(r"\w+|\s+|[^\w\s]+|.", TEXT)) | st.text(ASSIGNED)).map("".join)
KNOWN_TEXT = st.text(sorted(set(TEXT)))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> dict[str, transformers.PreTrainedTokenizerFast]:
    """Tokenizers that `transformers` loads from the exported folders."""
    found = {}
    for name, tokens in OURS.items():
        folder = tmp_path_factory.mktemp("exported") / "out"
        model = GPT(GPTConfig(block_size=64, vocab_size=tokens.vocab_size, n_layer=1, n_head=1, n_embd=4))
        model.save_pretrained(folder, tokens)
        found[name] = transformers.AutoTokenizer.from_pretrained(folder)
    return found


def assert_same(tokens: Tokenizer, theirs: transformers.PreTrainedTokenizerFast, text: str) -> None:
    ids = tokens.encode(text).tolist()
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == tokens.decode(ids)


@pytest.mark.parametrize("name", OURS)
def test_exported_tokenizer_encodes_alike(theirs, name):
    for text in (TEXT, TEXT[::-1], "", *TEXT, *TEXT.split()):
        assert_same(OURS[name], theirs[name], text)


@given(text=ANY_TEXT)
@pytest.mark.parametrize("name", [name for name in OURS if not name.startswith("char")])
def test_exported_tokenizer_encodes_any_text_alike(theirs, name, text):
    assert_same(OURS[name], theirs[name], text)


@given(text=KNOWN_TEXT)
@pytest.mark.parametrize("name", ["char", "char without an end"])
def test_exported_char_tokenizer_encodes_known_characters_alike(theirs, name, text):
    assert_same(OURS[name], theirs[name], text)


@pytest.mark.parametrize("name", ["char", "byte", "word", "gpt2", "cl100k_base"])
@given(data=st.data())
def test_exported_tokenizer_decodes_any_tokens_alike(theirs, name, data):
    """Tokens include halves of characters, and some that no text encodes to."""
    ids = data.draw(st.lists(st.sampled_from(sorted(theirs[name].get_vocab().values()))))
    assert theirs[name].decode(ids) == OURS[name].decode(ids)


@pytest.mark.parametrize("name", OURS)
def test_exported_tokenizer_has_special_tokens_and_limits(theirs, name):
    tokens, found = OURS[name], theirs[name]
    assert (found.eos_token_id, found.bos_token_id) == (tokens.end_of_text, tokens.end_of_text)
    assert found.unk_token_id == (tokens.unknown if name == "word" else None)
    assert found.model_max_length == 64
    # older versions remove spaces by default
    assert tokenizer.to_files(tokens, 64)["tokenizer_config.json"]["clean_up_tokenization_spaces"] is False
    assert set(found("the")) == {"input_ids", "attention_mask"}  # token types would get embeddings of GPT-2
    if tokens.end_of_text is None:
        return
    ids = [*tokens.encode("the").tolist(), tokens.end_of_text]
    assert found.decode(ids, skip_special_tokens=True) == "the"
    # plain text, as in this package, unless a program asks for the token
    if not name.startswith("char"):
        assert tokens.end_of_text not in found(END_OF_TEXT)["input_ids"]
        assert found(END_OF_TEXT, split_special_tokens=False)["input_ids"] == [tokens.end_of_text]


@pytest.mark.parametrize("name", OURS)
def test_exported_tokenizer_keeps_every_id(theirs, name):
    numbers = sorted(theirs[name].get_vocab().values())
    assert len(theirs[name].get_vocab()) == len(set(numbers))
    if isinstance(OURS[name], TiktokenTokenizer):
        gaps = {len(RANKS) + place for place in (0, 1, 2, 3, 4, GAP + 1, GAP + 2)}
        assert theirs[name].convert_tokens_to_ids(["<|fim|>"]) == [len(RANKS) + GAP + 3]
        assert set(numbers) == set(range(OURS[name].vocab_size)) - gaps
    else:
        assert numbers == list(range(OURS[name].vocab_size))


def test_exported_char_tokenizer_rejects_unknown_characters(theirs):
    with pytest.raises(Exception, match=r"WordLevel error: Missing \[UNK\] token"):
        theirs["char"]("Ж")


def test_exported_word_pattern_matches_pythons_word_characters(theirs):
    """For every character that this Python's Unicode version assigns."""
    pieces = theirs["word"].backend_tokenizer.pre_tokenizer
    for point in range(sys.maxunicode + 1):
        char = chr(point)
        if category(char) not in ("Cs", "Cn"):
            expected = ["a"] if char.isspace() else [f"a{char}"] if re.match(r"\w", char) else ["a", char]
            assert [piece for piece, _ in pieces.pre_tokenize_str(f"a{char}")] == expected, hex(point)


def small(ranks: dict[bytes, int]) -> TiktokenTokenizer:
    whole = {bytes([byte]): byte for byte in range(256)} | ranks
    return TiktokenTokenizer(tiktoken.Encoding("small", pat_str=r"\S+|\s+", mergeable_ranks=whole, special_tokens={}))


class Foreign:
    end_of_text = None


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (small({b"abc": 256}), r"the tokenizer has b'abc', which is no merge of two tokens, .*--no-tokenizer"),
        (small({b"abc": 256, b"ab": 257}), r"the tokenizer has b'abc', which is no merge of two tokens"),
        (CharTokenizer("a\udc80"), r"the tokenizer has the lone surrogate U\+DC80, .*--no-tokenizer"),
        (Foreign(), "tokenizer must be .*, got Foreign"),
    ],
)
def test_to_files_rejects_what_the_format_cannot_hold(tokens, message):
    with pytest.raises(ValueError, match=rf"\A{message}[^\n]*\Z"):
        tokenizer.to_files(tokens, 64)
