"""Files come back bit for bit or not at all, whatever happens to the disk."""

from __future__ import annotations

import math
import os

import pytest
import safetensors.torch
import torch

from gptfast.checkpoint.atomic_files import checksum, read_json, read_tensors, write_json, write_tensors
from tests.support.files import TENSORS, names, no_space


def test_read_tensors_returns_the_bits_written(tmp_path):
    path = tmp_path / "some.safetensors"
    write_tensors(path, TENSORS)
    found = read_tensors(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)
    assert checksum(found) == checksum(TENSORS)  # the sign of zero as well
    write_tensors(path, {})
    assert read_tensors(path) == {}
    assert names(tmp_path) == ["some.safetensors"]


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.tensor([1.0, 2.5])},
        {"b": torch.tensor([1.0, 2.0])},
        {"a": torch.tensor([[1.0, 2.0]])},
        {"a": torch.tensor([1.0, 2.0]).view(torch.int32)},
        {"a": torch.tensor([1.0, 2.0]), "b": torch.empty(0)},
        {},
    ],
    ids=["value", "name", "shape", "dtype", "one more", "none"],
)
def test_checksum_differs_for_other_tensors(other):
    assert checksum(other) != checksum({"a": torch.tensor([1.0, 2.0])})


def test_read_tensors_accepts_files_without_a_checksum(tmp_path):
    path = tmp_path / "theirs.safetensors"
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file({"a": torch.ones(2)}, path, metadata)
        assert read_tensors(path)["a"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x00" * 40, b"\xff" * 40])
def test_read_tensors_rejects_other_formats(tmp_path, content):
    path = tmp_path / "some.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"some\.safetensors is damaged: "):
        read_tensors(path)


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": \xff}', b"[1]", b"null"])
def test_read_json_rejects_all_but_objects(tmp_path, content):
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"some\.json is damaged: "):
        read_json(path)


@pytest.mark.parametrize("value", [math.nan, math.inf, object()])
def test_write_json_of_bad_values_keeps_the_older_file(tmp_path, value):
    path = tmp_path / "some.json"
    write_json(path, {"a": 1})
    with pytest.raises((ValueError, TypeError), match="JSON"):
        write_json(path, {"a": [value]})
    assert read_json(path) == {"a": 1}
    assert names(tmp_path) == ["some.json"]


def test_failed_writes_keep_the_older_files(tmp_path, monkeypatch):
    write_json(tmp_path / "some.json", {"a": 1})
    write_tensors(tmp_path / "some.safetensors", {"a": torch.ones(1)})
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match=r"cannot write .*some\.json: .*No space left on device"):
        write_json(tmp_path / "some.json", {"a": 2})
    with pytest.raises(OSError, match=r"cannot write .*some\.safetensors: .*No space left on device"):
        write_tensors(tmp_path / "some.safetensors", {"a": torch.zeros(1)})
    assert read_json(tmp_path / "some.json") == {"a": 1}
    assert read_tensors(tmp_path / "some.safetensors")["a"].tolist() == [1.0]
    assert names(tmp_path) == ["some.json", "some.safetensors"]
