import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gptfast import cli, tokenizers
from gptfast.commands.prepare import PrepareConfig, prepare
from gptfast.data import shards
from gptfast.training import trainer

TEXT = "To be, or not to be: that is the question.\n" * 60


def write_documents(folder: Path, count: int = 40) -> Path:
    path = folder / "documents.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"document {number} " * (number % 7 + 1)}) + "\n" for number in range(count))
    )
    return path


def read(folder: Path, split: str) -> str:
    tokens = shards.open_split(folder, split)
    tokenizer = tokenizers.from_json(json.loads((folder / "tokenizer.json").read_text()))
    return tokenizer.decode(tokens.windows(np.array([0]), len(tokens))[0].tolist())


def test_prepare_holds_out_the_end_of_a_single_text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    index = prepare(PrepareConfig(str(tmp_path / "text.txt"), str(tmp_path / "out"), "char"))
    boundary = int(len(TEXT) * 0.9)
    assert read(tmp_path / "out", "train") == TEXT[:boundary]
    assert read(tmp_path / "out", "val") == TEXT[boundary:]
    assert index["vocab_size"] == len(set(TEXT))
    assert {split: written["text_bytes"] for split, written in index["splits"].items()} == {
        "train": boundary,
        "val": len(TEXT) - boundary,
    }
    shards.verify(tmp_path / "out")


@pytest.mark.parametrize("tokenizer", ["char", "byte", "word"])
def test_prepare_holds_out_whole_documents(tmp_path, tokenizer: str):
    path = write_documents(tmp_path)
    config = PrepareConfig(str(path), str(tmp_path / "out"), tokenizer, held_out=0.2)
    index = prepare(config)
    found = {split: read(tmp_path / "out", split).split("<|endoftext|>") for split in shards.SPLITS}
    given = [json.loads(line)["text"].split() for line in path.read_text().splitlines()]
    for split, texts in found.items():
        assert texts.pop() == ""
        assert index["splits"][split]["documents"] == len(texts)
        assert all(text.split() in given for text in texts)
    assert sum(map(len, found.values())) == 40
    assert 2 <= len(found["val"]) <= 16
    assert found["val"][0].split()[:2] in (["document", "0"], ["document", "1"])


def test_prepare_reads_a_compressed_text_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("gptfast.data.documents.PIECE", 100)
    (tmp_path / "text.gz").write_bytes(gzip.compress(TEXT.encode()))
    prepare(PrepareConfig(str(tmp_path / "text.gz"), str(tmp_path / "out"), "byte", held_out=0.25))
    boundary = int(len(TEXT) * 0.75)
    assert read(tmp_path / "out", "train") == TEXT[:boundary] + "<|endoftext|>"
    assert read(tmp_path / "out", "val") == TEXT[boundary:] + "<|endoftext|>"


def test_prepare_writes_the_same_files_with_several_workers(tmp_path, monkeypatch):
    monkeypatch.setattr("gptfast.data.prepare._BATCH", 200)
    monkeypatch.setattr("gptfast.data.prepare._BYTES_PER_WORKER", 1)
    path = write_documents(tmp_path, count=60)
    outcomes = []
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        prepare(PrepareConfig(str(path), str(out), "byte", workers=workers, shard_tokens=500))
        outcomes.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert outcomes[0] == outcomes[1]
    assert len([name for name in outcomes[0] if name.startswith("train")]) > 2


def test_train_takes_a_prepared_folder(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    cli.main(["prepare", str(tmp_path / "text.txt"), "--tokenizer", "byte", "--out", str(tmp_path / "out")])
    assert "train: 2,323 tokens, 1.00 bytes of text each; documents: 1, files: 1" in capsys.readouterr().out
    shape = ["--block-size", "16", "--n-layer", "1", "--n-head", "1", "--n-embd", "8"]
    run = ["--device", "cpu", "--steps", "2", "--eval-batches", "1", "--out", str(tmp_path / "run")]
    cli.main(["train", "shakespeare-char", "--data", str(tmp_path / "out"), *shape, *run])
    assert "vocabulary 257" in capsys.readouterr().out
    saved = json.loads((tmp_path / "run" / "tokenizer.json").read_text())
    assert saved == {"kind": "byte"}


def test_train_on_nanogpts_tokens_needs_a_named_tokenizer(tmp_path):
    for split in shards.SPLITS:
        np.arange(100, dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
    config = trainer.TrainConfig(data=str(tmp_path), tokenizer="char", out=str(tmp_path / "run"), device="cpu")
    with pytest.raises(ValueError, match=r"has no tokenizer.json.*'char'.*--tokenizer"):
        trainer.train(config)


def test_prepare_leaves_nothing_after_an_error(tmp_path):
    path = write_documents(tmp_path)
    with path.open("a") as file:
        file.write("{broken\n")
    with pytest.raises(ValueError, match=r"documents.jsonl, line 41: not JSON"):
        prepare(PrepareConfig(str(path), str(tmp_path / "out"), "byte"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["documents.jsonl"]


def test_prepare_killed_leaves_no_complete_folder(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some words to be counted " * 2_000_000)
    arguments = ["prepare", str(path), "--tokenizer", "word", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "gptfast", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".out-*/train-*.bin")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        assert list(tmp_path.glob(".out-*"))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "out").exists()
    deadline = time.monotonic() + 60
    while processes_in(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_in(process.pid) == []


def processes_in(group: int) -> list[str]:
    """List the processes of a group that still run."""
    listed = subprocess.run(["ps", "-o", "pid=,stat=", "-g", str(group)], capture_output=True, text=True, check=False)
    return [line for line in listed.stdout.splitlines() if "Z" not in line]


@pytest.mark.slow
def test_prepare_needs_memory_independent_of_the_text(tmp_path):
    """Ten times the text adds less than 50 MiB to the largest process."""
    measure = (
        "import resource, sys; from gptfast import cli; cli.main(sys.argv[1:]); "
        "print(max(resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))"
    )
    peaks = []
    for megabytes in (30, 300):
        path, out = tmp_path / f"{megabytes}.txt", tmp_path / f"out{megabytes}"
        with path.open("w") as file:
            for _ in range(megabytes):
                file.write("some words to be counted " * 40_000)
        command = [sys.executable, "-c", measure, "prepare", str(path), "--tokenizer", "byte", "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.splitlines()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 50


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"held_out": 1.0}, "held_out must be between 0 and 1, got 1.0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"shard_tokens": 0}, "shard_tokens must be at least 1, got 0"),
    ],
)
def test_prepare_rejects_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig("stdlib", "out", **settings)


def test_prepare_rejects_a_folder_that_is_not_empty(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(ValueError, match="is not empty; give a new folder"):
        prepare(PrepareConfig(str(tmp_path / "text.txt"), str(tmp_path), "char"))


def test_prepare_rejects_a_text_too_short_to_split(tmp_path):
    (tmp_path / "few.jsonl").write_text('{"text": "one document alone"}\n')
    with pytest.raises(ValueError, match="leaves no tokens for val; give more text, or another --held-out"):
        prepare(PrepareConfig(str(tmp_path / "few.jsonl"), str(tmp_path / "out"), "byte"))
    assert not (tmp_path / "out").exists()
