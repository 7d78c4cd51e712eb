"""The training example runs, and its model loads."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import transformers

from gptfast import GPT
from tests.support.documents import run
from tests.support.tiny_runs import TEXT

SCRIPT = Path(__file__).parents[1] / "examples" / "train.py"
TINY = ["--n_layer", "2", "--n_head", "2", "--n_embd", "32", "--block_size", "16", "--device", "cpu"]


def test_example_learns_and_writes_a_model_for_transformers(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    options = ["--data", "text.txt", "--steps", "60", "--eval_interval", "20", "--warmup", "5", "--accumulation", "2"]
    command = [sys.executable, str(SCRIPT), *TINY, *options, "--learning_rate", "1e-2", "--out", "out"]
    printed = run(command, tmp_path)
    losses = [float(loss) for loss in re.findall(r"step \d+: validation loss ([\d.]+), [\d,]+ tokens/s", printed)]
    assert len(losses) == 3
    assert losses[-1] < 1.5 < losses[0]
    model = GPT.from_pretrained(str(tmp_path / "out")).eval()
    idx = torch.tensor([list(b"To be, or not to")])
    loss = model(idx[:, :-1], idx[:, 1:])[1].item()
    assert loss < 2.0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, model(idx, idx)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "none.txt"], r"none\.txt"),
        (["--out", "text.txt"], r"text\.txt exists .*--out"),
        (["--block_size", "400"], "1720 bytes .* 400"),
        (["--accumulation", "5"], "--batch_size .*--accumulation 5, got 12"),
        (["--accumulation", "0"], "--batch_size .*--accumulation 0, got 12"),
        (["--steps", "few"], "--steps.*'few'"),
    ],
)
def test_example_rejects_bad_options(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    monkeypatch.setattr("sys.argv", [str(SCRIPT), "--data", "text.txt", *TINY, *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 2
    assert re.search(f"train.py: error: .*{message}", capsys.readouterr().err.splitlines()[-1])
