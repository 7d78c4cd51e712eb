import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptfast.data import batches, shards
from gptfast.data.shards import SplitWriter, Tokens


def write(folder, vocab_size: int = 300, shard_tokens: int = 10, train: int = 25, val: int = 7) -> None:
    dtype = shards.dtype_for(vocab_size)
    splits = {}
    for split, count in (("train", train), ("val", val)):
        writer = SplitWriter(folder, split, dtype, shard_tokens)
        for start in range(0, count, 4):
            writer.append(np.arange(start, min(start + 4, count)))
        writer.documents, writer.text_bytes = 1, 2 * count
        splits[split] = writer.close()
    shards.write_index(folder, vocab_size, dtype, splits)


def ids(tokens: Tokens) -> list[int]:
    return tokens.windows(np.array([0]), len(tokens))[0].tolist()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_open_split_reads_what_was_written(tmp_path, vocab_size: int, dtype: str):
    write(tmp_path, vocab_size)
    assert ids(shards.open_split(tmp_path, "train")) == list(range(25))
    assert ids(shards.open_split(tmp_path, "val")) == list(range(7))
    index = shards.read_index(tmp_path)
    assert (index["vocab_size"], index["dtype"]) == (vocab_size, dtype)
    assert [shard["tokens"] for shard in index["splits"]["train"]["shards"]] == [10, 10, 5]
    assert index["splits"]["train"]["tokens"] == 25
    shards.verify(tmp_path)
    assert shards.is_prepared(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.bin")) == [
        "train-00000.bin", "train-00001.bin", "train-00002.bin", "val-00000.bin",
    ]  # fmt: skip


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.data())
def test_windows_cross_shard_boundaries(lengths: list[int], drawn: st.DataObject):
    total = sum(lengths)
    row = np.arange(total, dtype=np.uint16)
    tokens = Tokens(np.split(row, np.cumsum(lengths)[:-1]))
    assert len(tokens) == total
    length = drawn.draw(st.integers(0, total))
    starts = np.array(drawn.draw(st.lists(st.integers(0, total - length), min_size=1)))
    expected = starts[:, None] + np.arange(length)
    assert np.array_equal(tokens.windows(starts, length), expected)


def test_open_split_reads_nanogpts_folders(tmp_path):
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(20, dtype=np.uint16).tofile(tmp_path / "val.bin")
    assert shards.is_prepared(tmp_path)
    assert ids(shards.open_split(tmp_path, "train")) == list(range(50))
    train, val = batches.open_prepared(tmp_path, block_size=8)
    assert (len(train.tokens), len(val.tokens)) == (50, 20)


def truncate(folder) -> None:
    path = folder / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:-2])


def lose(folder) -> None:
    (folder / "train-00001.bin").unlink()


def change_format(folder) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"format": 2}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "train-00001.bin is damaged: it has 18 bytes, 20 bytes are needed; prepare the data again"),
        (lose, "train-00001.bin is missing; prepare the data again"),
        (change_format, "index.json is no index of token shards in format 1"),
        (lambda folder: (folder / "index.json").write_text("{"), "index.json is damaged"),
        (lambda folder: (folder / "index.json").unlink(), "neither an index.json nor a train.bin"),
    ],
)
def test_open_split_names_damage(tmp_path, damage, message):
    write(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        shards.open_split(tmp_path, "train")


def test_verify_finds_a_changed_byte(tmp_path):
    write(tmp_path)
    path = tmp_path / "train-00000.bin"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00000.bin is damaged: its checksum does not match"):
        shards.verify(tmp_path)


def test_open_prepared_rejects_a_split_shorter_than_a_block(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match=r"7 tokens for val.*block_size=7"):
        batches.open_prepared(tmp_path, block_size=7)


def test_open_split_rejects_an_odd_file_of_nanogpt(tmp_path):
    (tmp_path / "train.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"train.bin is damaged: it has 3 bytes, a multiple of 2 bytes is needed"):
        shards.open_split(tmp_path, "train")
