"""The command line: options, settings files, errors, interrupts and help."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptfast import cli
from gptfast.training.config import TrainConfig
from tests.support.command_line import error, output
from tests.support.tiny_runs import TEXT, before_step, raising

TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--steps", "20", "--batch-size", "4"]


@pytest.fixture
def text(here) -> str:
    Path("text.txt").write_text(TEXT)
    return "text.txt"


def train(*options: str) -> None:
    cli.main(["train", "shakespeare-char", "--data", "text.txt", "--device", "cpu", *TINY, *options])


def run_process(*arguments: str) -> str:
    """Run the command line in a process, and return its standard output."""
    command = [sys.executable, "-m", "gptfast", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_cli_trains_and_generates(text, capsys):
    out = run_process("train", "shakespeare-char", "--data", text, "--out", "run", "--device", "cpu", *TINY)
    assert "validation loss" in out
    assert out.splitlines()[-1] == "gptfast generate run"
    assert json.loads(Path("run/summary.json").read_text())["steps"] == 20
    arguments = ("generate", "run", "--prompt", "To be", "--max-new-tokens", "30", "--device", "cpu")
    generated = run_process(*arguments)
    assert generated.startswith("To be")
    assert len(generated) == len("To be") + 30 + len("\n")
    assert set(generated) <= set(TEXT)
    assert run_process(*arguments) == generated
    assert output(capsys, *arguments, "--seed", "7") != generated
    assert len(output(capsys, *arguments, "--num-samples", "2")) == 2 * len(generated)


def test_cli_starts_without_the_compiler():
    """Its import takes longer than everything else."""
    code = "import sys; from gptfast import cli; print({'torch._dynamo', 'torch._inductor'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "missing.txt"], r"'missing\.txt'.*stdlib, shakespeare, chatbot, "),
        (["--data", "empty.txt"], "empty.txt is empty"),
        (["--block-size", "400"], "1548 tokens .*172 held out.*block_size=400"),
        (["--block-size", "1720", "--held-out", "0"], "1720 tokens.*block_size=1720"),
        (["--sample-prompt", "Zu"], "sample_prompt 'Zu': .*'Z'"),
        (["--tokenizer", "word", "--held-out", "0", "--sample-prompt", " "], "sample_prompt ' ' .*--sample-prompt"),
        (["--n-embd", "30", "--n-head", "4"], "n_embd=30 and n_head=4"),
        (["--backend", "cuda"], "backend 'cuda'.*auto, triton, "),
        (["--backend", "mlp=eager"], "'mlp' in backend.*layer_norm, ffn, attention, loss"),
        (["--device", "tpu"], "'tpu'.*auto, "),
        (["--device=tpu"], "'tpu'.*auto, "),
        (["--device", "cpu", "--device=tpu"], "'tpu'.*auto, "),
        (["--device", "cuda:99"], "'cuda:99'.*auto, "),
        (["--dropout", "half"], "--dropout: .*'half'"),
        (["--dropout", "1"], r"dropout .*\[0, 1\), got 1\.0"),
        (["--dtype", "int8"], "'int8'.*auto, float32, bfloat16, float16"),
        (["--config", "none.json"], r"none\.json"),
        (["--config", "text.txt"], r"text\.txt is damaged: Expecting value"),
        (["--config", "bad.toml"], r"bad\.toml is damaged: "),
        (["--config", "unknown.toml"], "--layers, 3"),
        (["--config", "device.toml"], "'tpu'.*auto, "),
        (["--config", "vocabulary.toml"], "--vocab-size .*tokenizer"),
        (["--init-from", "gpt5"], "'gpt5'.*gpt2, "),
        (["--freeze", "x.*"], r"'x\.\*'.*transformer\.wte\.weight, "),
        (["--tokenizer", "bert"], "'bert'.*char, byte, word, gpt2, "),
        (["--steps", "0"], "steps .*got 0"),
        (["--batch-size", "1000000000000"], "batch_size .*got 1000000000000"),
        (["--seed", "18446744073709551616"], "seed .*got 18446744073709551616"),
        (["--init-std", "inf"], "init_std .*got inf"),
        (["--activation", "swish"], "'swish' .*--activation.*gelu_tanh"),
        (["--n-layer", "x"], "--n-layer: .*'x'"),
        (["--n-layer"], "'--n-layer'"),
        (["--layers", "3"], "--layers, 3"),
        (["--vocab-size", "9"], "--vocab-size .*tokenizer"),
        (["--out", "taken"], "taken is not empty"),
    ],
)
def test_train_rejects_bad_options(text, capsys, options, message):
    Path("empty.txt").touch()
    Path("bad.toml").write_text("= 3")
    Path("unknown.toml").write_text("layers = 3")
    Path("device.toml").write_text("device = 'tpu'")
    Path("vocabulary.toml").write_text("vocab_size = 9")
    Path("taken").mkdir()
    Path("taken/file").touch()
    before = sorted(Path().rglob("*"))
    assert re.search(message, error(capsys, "train", "shakespeare-char", "--data", text, *options))
    assert sorted(Path().rglob("*")) == before, "a run folder was left behind"


@pytest.mark.parametrize("options", [["--device", "tpu", "--steps", "3", "--device", "cpu"], ["--config", "cpu.toml"]])
def test_train_chooses_the_preset_by_the_device(text, monkeypatch, options):
    Path("cpu.toml").write_text("device = 'cpu'")
    asked = []
    monkeypatch.setattr("gptfast.training.recipes.recipe", lambda name, device: asked.append(device) or {}[name])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(KeyError):
        cli.main(["train", "shakespeare-char", *options])
    assert asked == [torch.device("cpu")]


def test_cli_rejects_unknown_words(capsys):
    assert re.search("'gpt5'.*shakespeare-char, ", error(capsys, "train", "gpt5"))
    assert re.search("'sing'.*train, prepare, generate, eval, export, doctor", error(capsys, "sing"))


def test_train_reports_a_loss_that_is_not_finite(text, capsys):
    with pytest.raises(SystemExit) as ended:
        train("--learning-rate", "1e30")
    assert ended.value.code == 1
    assert re.search(r"^gptfast: .*loss is (nan|inf) at step \d+; .*--learning-rate", capsys.readouterr().err, re.M)


@pytest.mark.parametrize(
    "failure",
    [
        MemoryError("Unable to allocate 7.28 TiB for an array"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] err == 0. DefaultCPUAllocator: can't allocate memory: 4 bytes"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_train_reports_too_little_memory_and_leaves_no_folder(text, monkeypatch, capsys, failure):
    before_step(monkeypatch, 0, raising(failure))
    with pytest.raises(SystemExit) as ended:
        train("--out", "run")
    assert ended.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert re.match("gptfast: out of memory.* (Unable|CUDA|can't) .+", lines[-1])
    assert not Path("run").exists()


def test_train_reports_a_model_beyond_the_memory(text, capsys):
    options = ["--data", text, "--device", "cpu", "--n-embd", "1000000000000", "--n-head", "1", "--block-size", "16"]
    assert error(capsys, "train", "shakespeare-char", *options, status=1).startswith("out of memory")


def test_cli_reports_errors_of_the_file_system(text, monkeypatch, capsys):
    too_long = "x" * 300
    assert "File name too long" in error(capsys, "train", "shakespeare-char", "--data", too_long, status=1)
    assert "File name too long" in error(capsys, "generate", too_long, status=1)

    full_disk = raising(OSError(28, "No space left on device"))
    monkeypatch.setattr("os.fsync", lambda descriptor: full_disk())
    line = error(capsys, "train", "shakespeare-char", "--data", text, "--out", "full", status=1)
    assert line == "cannot write full/config.json: [Errno 28] No space left on device"
    assert not Path("full").exists()


def test_cli_reports_an_interrupt(trained, monkeypatch, capsys):
    interrupt = raising(KeyboardInterrupt())
    monkeypatch.setattr("gptfast.generation.autoregressive.sample", lambda *arguments: interrupt())
    assert error(capsys, "generate", trained, status=130) == "interrupted"


def test_interrupted_train_prints_how_to_continue(text, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        before_step(patched, 7, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(SystemExit) as ended:
            train("--out", "run")
    assert ended.value.code == 130
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("no evaluation yet after 8 steps in ")
    assert lines[-1] == "interrupted; to continue: gptfast train run"
    Path("settings.toml").write_text("steps = 12\nlog_interval = 2\nout = 'other'\n")
    out = output(capsys, *lines[-1].split("gptfast ")[1].split(), "--config", "settings.toml", "--log-interval", "3")
    assert "continuing run after step 8" in out
    assert "after 12 steps" in out
    assert not Path("other").exists()


def test_print_config_round_trips(text, capsys):
    train("--out", "run", "--print-config")
    printed = json.loads(capsys.readouterr().out)
    assert (printed["steps"], printed["model"]["n_embd"], printed["data"]) == (20, 16, text)
    assert not Path("run").exists()
    train("--out", "run", "--freeze", "*.bias", "*.wpe.*", "--no-compile", "--bias")
    assert "shakespeare-char with data='text.txt', out='run', freeze=('*.bias', '*.wpe" in capsys.readouterr().out
    saved = json.loads(Path("run/config.json").read_text())
    assert saved["freeze"] == ["*.bias", "*.wpe.*"]
    Path("settings.json").write_text(json.dumps(saved | {"out": "again"}))
    again = json.loads(output(capsys, "train", "shakespeare-char", "--config", "settings.json", "--print-config"))
    again["model"]["vocab_size"] = saved["model"]["vocab_size"]  # the tokenizer determines it
    assert again == saved | {"out": "again"}


def test_options_override_files_and_files_override_presets(here, capsys):
    Path("settings.toml").write_text("steps = 7\nseed = 3\n[model]\nn_layer = 2\n")
    options = ["--config=settings.toml", "--seed", "4", "--print-config"]
    printed = json.loads(output(capsys, "train", "shakespeare-char-cpu", *options))
    assert (printed["steps"], printed["seed"], printed["model"]["n_layer"], printed["batch_size"]) == (7, 4, 2, 12)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train"], ["train", "--help"]])
def test_cli_prints_its_usage(capsys, arguments):
    usage = output(capsys, *arguments)
    assert usage.startswith("usage: gptfast prepare SOURCE")
    assert all(f"gptfast {command} " in usage for command in ("train", *cli.COMMANDS))


@pytest.mark.parametrize("command", ["train", *cli.COMMANDS])
def test_help_lists_every_option(capsys, command):
    """All fields are options, except for positional arguments and groups."""
    config = TrainConfig if command == "train" else cli.COMMANDS[command][0]
    with pytest.raises(SystemExit) as ended:
        cli.main([command, *["shakespeare-char"] * (command == "train"), "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for name in {field.name for field in dataclasses.fields(config)} - {"model", "sampling", "source", "run"}:
        assert f"--{name.replace('_', '-')}" in out or (command, name) == ("export", "out")


@pytest.mark.parametrize(("rank", "waited"), [("0", []), ("1", [20.0])])
def test_other_ranks_report_bad_arguments_after_rank_0(monkeypatch, capsys, rank, waited):
    monkeypatch.setenv("RANK", rank)
    slept = []
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    assert error(capsys, "nonsense").startswith("unknown command 'nonsense'")
    assert slept == waited
