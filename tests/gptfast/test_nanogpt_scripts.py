"""nanoGPT's own scripts, from a checkout, with their one line of import changed."""

import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gptfast import GPT, GPTConfig
from tests.support.nanogpt import TEXT

pytestmark = pytest.mark.slow

THEIRS, OURS = "from model import GPTConfig, GPT\n", "from gptfast import GPTConfig, GPT\n"
TINY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16", "--batch_size=4", "--dropout=0.0"]
STEPS = ["--dataset=tiny", "--eval_iters=1", "--eval_interval=2", "--log_interval=1", "--always_save_checkpoint=True"]
ON_CPU = ["--device=cpu", "--compile=False"]
TRAIN = [*TINY, *STEPS, *ON_CPU, "--gradient_accumulation_steps=2", "--warmup_iters=1"]
SAMPLE = [*ON_CPU, "--num_samples=2", "--max_new_tokens=30", "--start=To be", "--top_k=1"]


@pytest.fixture
def folder(nanogpt, tmp_path) -> Path:
    """nanoGPT's scripts, and a text prepared as its data/shakespeare_char/prepare.py does."""
    for name in ("train.py", "sample.py", "bench.py", "configurator.py", "model.py"):
        shutil.copy(nanogpt / name, tmp_path)
    data = tmp_path / "data/tiny"
    data.mkdir(parents=True)
    chars = sorted(set(TEXT))
    numbers = {char: number for number, char in enumerate(chars)}
    for split in ("train", "val"):
        np.array([numbers[char] for char in TEXT], dtype=np.uint16).tofile(data / f"{split}.bin")
    meta = {"vocab_size": len(chars), "stoi": numbers, "itos": dict(enumerate(chars))}
    (data / "meta.pkl").write_bytes(pickle.dumps(meta))
    return tmp_path


def change_the_import(folder: Path) -> None:
    for name in ("train.py", "sample.py", "bench.py"):
        script = (folder / name).read_text()
        assert script.count(THEIRS) == 1
        (folder / name).write_text(script.replace(THEIRS, OURS))
    (folder / "model.py").unlink()


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.check_output([sys.executable, *command], cwd=folder, env=environment, text=True)


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"iter \d+: loss ([\d.]+)", printed)]


def test_nanogpt_scripts_train_resume_and_sample(folder):
    change_the_import(folder)
    first = run(folder, "train.py", *TRAIN, "--max_iters=3")
    assert len(losses(first)) == 4
    assert losses(first)[0] == pytest.approx(np.log(18), abs=0.2)
    second = run(folder, "train.py", *TRAIN, "--max_iters=8", "--init_from=resume")
    assert "iter 2: loss" in second
    assert "iter 8: loss" in second
    assert losses(second)[-1] < losses(first)[0]
    printed = run(folder, "sample.py", *SAMPLE)
    texts = printed.split("\n---------------\n")
    assert re.search(r"To be.{30}$", texts[0], re.DOTALL)
    assert texts[1] == re.search(r"To be.{30}$", texts[0], re.DOTALL)[0]
    assert GPT.from_nanogpt(folder / "out/ckpt.pt").config.activation == "gelu_tanh"


def test_nanogpt_scripts_resume_nanogpts_own_checkpoint(folder):
    """Trained there, resumed there and here: the same losses, and the same text."""
    settings = [*TRAIN, "--learning_rate=1e-2", "--lr_decay_iters=80"]
    run(folder, "train.py", *settings, "--max_iters=60")
    shutil.copytree(folder / "out", folder / "theirs")
    sampled = run(folder, "sample.py", *SAMPLE)
    expected = run(folder, "train.py", *settings, "--max_iters=66", "--init_from=resume")
    shutil.rmtree(folder / "out")
    (folder / "theirs").rename(folder / "out")
    change_the_import(folder)
    text = sampled.partition("meta.pkl...\n")[2]
    assert len(set(text)) > 10
    assert run(folder, "sample.py", *SAMPLE).endswith(f"meta.pkl...\n{text}")
    resumed = run(folder, "train.py", *settings, "--max_iters=66", "--init_from=resume")
    assert losses(resumed) == pytest.approx(losses(expected), abs=2e-4)
    assert len(losses(resumed)) == 7
    # the weights carry their activation through both scripts
    assert GPT.from_nanogpt(folder / "out/ckpt.pt").config.activation == "gelu"


def test_nanogpt_scripts_finetune_a_pretrained_model(folder):
    """`--init_from=gpt2` reads a small model from a folder of that name, and crops its context."""
    change_the_import(folder)
    config = GPTConfig(block_size=32, vocab_size=18, n_layer=1, n_head=2, n_embd=16)
    GPT(config).save_pretrained(folder / "gpt2")
    printed = run(folder, "train.py", *TRAIN, "--max_iters=3", "--init_from=gpt2")
    assert len(losses(printed)) == 4
    saved = torch.load(folder / "out/ckpt.pt")["model_args"]
    assert (saved["n_layer"], saved["n_embd"], saved["block_size"], saved["bias"]) == (1, 16, 16, True)


def test_nanogpt_scripts_benchmark(folder):
    """bench.py synchronises a GPU on any device; a stub replaces that."""
    change_the_import(folder)
    arguments = ["bench.py", "--real_data=False", "--batch_size=1", "--block_size=8", *ON_CPU]
    before = f"import runpy, sys, torch; torch.cuda.synchronize = lambda: None; sys.argv = {arguments}"
    printed = run(folder, "-c", f"{before}; runpy.run_path('bench.py', run_name='__main__')")
    assert re.search(r"^time per iteration: [\d.]+ms, MFU: ", printed, re.MULTILINE)
    found = [float(loss) for loss in re.findall(r"^\d+/20 loss: ([\d.]+)$", printed, re.MULTILINE)]
    assert len(found) == 20
    assert found[-1] < np.log(50304)
