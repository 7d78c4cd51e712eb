import io
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
from tests.support.tiny_runs import before_step, raising

TEXT = "To be, or not to be, that is the question:\n" * 40
TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--steps", "20", "--batch-size", "4"]


@pytest.fixture
def text(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    return "text.txt"


def gptfast(*arguments: str) -> subprocess.CompletedProcess:
    """The command as a person runs it, in a process of its own."""
    command = [sys.executable, "-m", "gptfast", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_train_and_generate(text):
    trained = gptfast("train", "shakespeare-char", "--data", text, "--out", "run", "--device", "cpu", *TINY)
    assert trained.returncode == 0, trained.stderr
    assert "validation loss" in trained.stdout
    assert trained.stdout.splitlines()[-1] == "gptfast generate run"
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["steps"] == 20
    assert {"val_loss", "train_loss", "tokens_per_second", "mfu", "params", "seconds", "device", "backend"} <= set(
        summary
    )

    arguments = ("generate", "run", "--prompt", "To be", "--max-new-tokens", "30", "--device", "cpu")
    generated = gptfast(*arguments)
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout.startswith("To be")
    assert len(generated.stdout) == len("To be") + 30 + len("\n")
    assert set(generated.stdout) <= set(TEXT)
    assert gptfast(*arguments).stdout == generated.stdout
    assert gptfast(*arguments, "--seed", "7").stdout != generated.stdout
    twice = gptfast(*arguments, "--num-samples", "2").stdout
    assert len(twice) == 2 * len(generated.stdout)


def test_starts_without_the_compiler():
    """Importing it takes longer than all else together."""
    code = "import sys; from gptfast import cli; print({'torch._dynamo', 'torch._inductor'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def fails(capsys, *arguments: str, status: int = 2) -> str:
    """The error line of a command that ends with this exit status and prints nothing else."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    printed = capsys.readouterr()
    assert ended.value.code == status
    assert printed.out == ""
    assert re.fullmatch(r"gptfast: [^\n]+\n", printed.err), printed.err
    return printed.err.removeprefix("gptfast: ").rstrip()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "missing.txt"], "no such data: 'missing.txt'; accepted: stdlib, shakespeare, chatbot, "),
        (["--data", "empty.txt"], "empty.txt is empty"),
        (["--block-size", "400"], "the text is too short: 1720 tokens make 1548 to train on and 172 held out"),
        (["--block-size", "1720", "--held-out", "0"], "the text is too short: 1720 tokens, more than block_size=1720 "),
        (["--sample-prompt", "Zu"], "sample_prompt 'Zu': the tokenizer lacks the characters 'Z'; accepted: the 17 of "),
        (
            ["--tokenizer", "word", "--held-out", "0", "--sample-prompt", " "],
            "sample_prompt ' ' has no tokens; give at least one word ",
        ),
        (["--n-embd", "30", "--n-head", "4"], "n_embd must be divisible by n_head, got n_embd=30 and n_head=4"),
        (["--backend", "cuda"], "unknown backend 'cuda'; accepted: auto, triton, cpu, eager"),
        (["--backend", "mlp=eager"], "unknown operator 'mlp' in backend; accepted: layer_norm, ffn, attention, loss"),
        (["--device", "tpu"], "no device 'tpu' here; accepted: auto, "),
        (["--device=tpu"], "no device 'tpu' here; accepted: auto, "),
        (["--device", "cpu", "--device=tpu"], "no device 'tpu' here; accepted: auto, "),
        (["--dropout", "half"], "Error parsing --dropout: could not convert string to float: 'half'"),
        (["--dropout", "1"], "dropout must be in [0, 1), got 1.0"),
        (["--device", "cuda:99"], "no device 'cuda:99' here; accepted: auto, "),
        (["--dtype", "int8"], "unknown dtype 'int8'; accepted: auto, float32, bfloat16, float16"),
        (["--config", "none.json"], "no such file with settings: none.json"),
        (["--config", "text.txt"], "text.txt is damaged: Expecting value"),
        (["--config", "bad.toml"], "bad.toml is damaged: "),
        (["--config", "unknown.toml"], "Unrecognized options: --layers, 3"),
        (["--init-from", "gpt5"], "no pretrained model 'gpt5'; accepted: gpt2, "),
        (["--freeze", "x.*"], "no parameter matches 'x.*'; accepted: names such as transformer.wte.weight, "),
        (["--tokenizer", "bert"], "unknown tokenizer 'bert'; accepted: char, byte, word, gpt2, "),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--batch-size", "1000000000000"], "batch_size must be below 2**31, got 1000000000000"),
        (["--seed", "18446744073709551616"], "seed must be in [0, 2**64), got 18446744073709551616"),
        (["--init-std", "inf"], "init_std must be above 0 and finite, got inf"),
        (["--activation", "swish"], "invalid choice 'swish' for argument '--activation'. Expected one of ('gelu_tanh'"),
        (["--n-layer", "x"], "Error parsing --n-layer: invalid literal for int() with base 10: 'x'"),
        (["--n-layer"], "Missing value for argument '--n-layer'. Expected 1 values."),
        (["--layers", "3"], "Unrecognized options: --layers, 3"),
        (["--vocab-size", "9"], "--vocab-size cannot be set: the tokenizer determines it"),
        (["--out", "taken"], "the run folder taken is not empty"),
    ],
)
def test_bad_training_input(text, capsys, options, message):
    Path("empty.txt").touch()
    Path("bad.toml").write_text("= 3")
    Path("unknown.toml").write_text("layers = 3")
    Path("taken").mkdir()
    Path("taken/file").touch()
    before = sorted(Path().rglob("*"))
    error = fails(capsys, "train", "shakespeare-char", "--data", text, *options)
    assert error.startswith(message)
    assert sorted(Path().rglob("*")) == before, "a run folder was left behind"


def test_the_last_device_decides_the_recipe(text, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("gptfast.training.recipes.recipe", lambda name, device: asked.append(device) or {}[name])
    with pytest.raises(KeyError):
        cli.main(["train", "shakespeare-char", "--device", "tpu", "--steps", "3", "--device", "cpu"])
    assert asked == [torch.device("cpu")]


@pytest.mark.parametrize(
    ("printed", "message"),
    [
        ("gptfast: error:\n  plain text\n", "gptfast: error: plain text"),
        ("", "unknown options; see gptfast generate --help"),
    ],
)
def test_a_parser_that_draws_no_box(monkeypatch, capsys, printed, message):
    def refuse(*arguments, **options):
        sys.stderr.write(printed)
        sys.exit(2)

    monkeypatch.setattr("tyro.cli", refuse)
    assert fails(capsys, "generate", "run") == message


def test_unknown_words(capsys):
    assert fails(capsys, "train", "gpt5").startswith("unknown preset 'gpt5'; accepted: shakespeare-char, ")
    assert fails(capsys, "sing") == "unknown command 'sing'; accepted: prepare, train, generate, eval, export, doctor"


@pytest.fixture
def trained(text) -> str:
    cli.main(["train", "shakespeare-char", "--data", text, "--out", "run", "--device", "cpu", *TINY, "--steps", "1"])
    return "run"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "Zürich"], "the tokenizer lacks the characters 'Zcü'; accepted: the 17 of its training text"),
        (["--prompt", ""], "the prompt is empty; give at least one character"),
        (["--temperature", "-1"], "temperature must be at least 0 and finite, got -1.0"),
        (["--top-k", "0"], "top_k must be at least 1, got 0"),
        (["--max-new-tokens", "-5"], "max_new_tokens must be at least 0, got -5"),
        (["--seed", "-1"], "seed must be in [0, 2**64), got -1"),
        (["--seed", "18446744073709551616"], "seed must be in [0, 2**64), got 18446744073709551616"),
        (["--top-p", "1.5"], "top_p must be above 0 and at most 1, got 1.5"),
        (["--prompt-file", "none.txt"], "no such file with prompts: none.txt"),
        (["--json", "--stream"], "--json writes whole continuations; it excludes --stream"),
        (["--interactive", "--json"], "--interactive asks for prompts and writes text; it excludes --prompt-file and"),
        (["--num-samples", "0"], "num_samples must be at least 1, got 0"),
        (["--device", "tpu"], "no device 'tpu' here; accepted: auto, "),
        (["--backend", "cuda"], "unknown backend 'cuda'; accepted: auto, triton, cpu, eager"),
    ],
)
def test_bad_generation_input(trained, capsys, options, message):
    capsys.readouterr()
    assert fails(capsys, "generate", trained, *options).startswith(message)


def generated(capsys, *arguments: str) -> str:
    capsys.readouterr()
    cli.main(["generate", *arguments, "--device", "cpu"])
    return capsys.readouterr().out


def test_pieces_of_a_stream_are_the_text(trained, capsys):
    options = [trained, "--prompt", "To", "--max-new-tokens", "20"]
    assert generated(capsys, *options, "--stream") == generated(capsys, *options)


def test_prompts_from_a_file_and_from_standard_input(trained, capsys, monkeypatch):
    Path("prompts.txt").write_text("To\nbe or\n")
    options = [trained, "--max-new-tokens", "5", "--temperature", "0", "--prompt-file"]
    lines = generated(capsys, *options, "prompts.txt", "--json").splitlines()
    found = [json.loads(line) for line in lines]
    assert [entry["prompt"] for entry in found] == ["To", "be or"]
    assert all(len(entry["tokens"]) == len(entry["log_probs"]) == len(entry["text"]) == 5 for entry in found)
    monkeypatch.setattr("sys.stdin", io.StringIO("To\nbe or\n"))
    assert generated(capsys, *options, "-", "--json").splitlines() == lines


def test_a_conversation(trained, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    typed = iter(["To", "", "be"])

    def answer(question: str) -> str:
        assert question == "> "
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    written = generated(capsys, trained, "--interactive", "--max-new-tokens", "3")
    assert written.startswith("To")
    assert "\nbe" in written
    assert (tmp_path / "cache/gptfast/prompts").is_file()


def test_a_stop_string(trained, capsys):
    free = generated(capsys, trained, "--prompt", "To", "--max-new-tokens", "30")
    stop = free[10]
    text = generated(capsys, trained, "--prompt", "To", "--max-new-tokens", "30", "--stop", stop)
    assert text == free[: free.index(stop, 2)] + "\n"


def test_no_run_folder_given(capsys):
    assert fails(capsys, "generate").startswith("Missing from gptfast generate: STR Run folder, folder in Hugging Face")


def test_not_a_run_folder(tmp_path, capsys):
    assert fails(capsys, "generate", str(tmp_path)).endswith("is not a run folder with weights: it has no config.json")


def test_a_loss_that_is_no_number_is_one_line(text, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "shakespeare-char", "--data", text, "--device", "cpu", *TINY, "--learning-rate", "1e30"])
    assert ended.value.code == 1
    assert re.search(
        r"^gptfast: the loss is (nan|inf) at step \d+; lower --learning-rate", capsys.readouterr().err, re.M
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 7.28 TiB for an array"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: 4 bytes"
        ),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_is_one_line_and_leaves_no_folder(text, monkeypatch, capsys, error):
    before_step(monkeypatch, 0, raising(error))
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "shakespeare-char", "--data", text, "--out", "run", "--device", "cpu", *TINY])
    assert ended.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert re.match("gptfast: out of memory, a smaller model or batch may fit: (Unable|CUDA|can't) .+", lines[-1])
    assert not Path("run").exists()


def test_a_model_beyond_the_memory(text, capsys):
    options = ["--data", text, "--device", "cpu", "--n-embd", "1000000000000", "--n-head", "1", "--block-size", "16"]
    error = fails(capsys, "train", "shakespeare-char", *options, status=1)
    assert error.startswith("out of memory, a smaller model or batch may fit: can't allocate memory: you tried to")


def test_errors_of_the_file_system_are_one_line(trained, monkeypatch, capsys):
    capsys.readouterr()
    too_long = "x" * 300
    assert "File name too long" in fails(capsys, "train", "shakespeare-char", "--data", too_long, status=1)
    assert "File name too long" in fails(capsys, "generate", too_long, status=1)

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    error = fails(capsys, "train", "shakespeare-char", "--data", "text.txt", "--out", "full", status=1)
    assert error == "cannot write full/config.json: [Errno 28] No space left on device"
    assert not Path("full").exists()


def test_an_interrupt_outside_of_training_is_one_line(trained, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    capsys.readouterr()
    monkeypatch.setattr("gptfast.generation.autoregressive.sample", interrupt)
    assert fails(capsys, "generate", trained, status=130) == "interrupted"


def test_an_interrupted_run_says_how_to_go_on(text, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        before_step(patched, 7, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", "shakespeare-char", "--data", text, "--out", "run", "--device", "cpu", *TINY])
    assert ended.value.code == 130
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("no evaluation yet after 8 steps in ")
    assert lines[-1] == "interrupted; to continue: gptfast train run"
    cli.main(lines[-1].split("gptfast ")[1].split())
    out = capsys.readouterr().out
    assert "continuing run after step 8" in out
    assert "after 20 steps" in out


def test_settings_are_printed_back(text, capsys):
    arguments = ["train", "shakespeare-char", "--data", text, "--out", "run", "--device", "cpu", *TINY]
    cli.main([*arguments, "--print-config"])
    printed = json.loads(capsys.readouterr().out)
    assert (printed["steps"], printed["model"]["n_embd"], printed["data"]) == (20, 16, text)
    assert not Path("run").exists()
    cli.main([*arguments, "--freeze", "*.bias", "*.wpe.*", "--no-compile", "--bias"])
    assert capsys.readouterr().out.startswith(
        "shakespeare-char with data='text.txt', out='run', freeze=('*.bias', '*.wpe"
    )
    saved = json.loads(Path("run/config.json").read_text())
    assert saved["freeze"] == ["*.bias", "*.wpe.*"]
    Path("settings.json").write_text(json.dumps(saved | {"out": "again"}))
    cli.main(["train", "shakespeare-char", "--config", "settings.json", "--print-config"])
    again = json.loads(capsys.readouterr().out)
    again["model"]["vocab_size"] = saved["model"]["vocab_size"]  # the tokenizer determines it
    assert again == saved | {"out": "again"}


def test_options_win_over_files_and_files_over_presets(text, capsys):
    Path("settings.toml").write_text("steps = 7\nseed = 3\n[model]\nn_layer = 2\n")
    cli.main(["train", "shakespeare-char-cpu", "--config=settings.toml", "--seed", "4", "--print-config"])
    printed = json.loads(capsys.readouterr().out)
    assert (printed["steps"], printed["seed"], printed["model"]["n_layer"], printed["batch_size"]) == (7, 4, 2, 12)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train"], ["train", "--help"]])
def test_usage(capsys, arguments):
    cli.main(arguments)
    assert capsys.readouterr().out.startswith("usage: gptfast prepare SOURCE")


@pytest.mark.parametrize("arguments", [["train", "shakespeare-char", "--help"], ["generate", "--help"]])
def test_help_lists_the_options(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0
    assert "--backend" in capsys.readouterr().out


@pytest.mark.parametrize(("rank", "waited"), [("0", []), ("1", [20.0])])
def test_what_is_wrong_for_one_process_alone_is_said_when_the_first_had_its_time(monkeypatch, capsys, rank, waited):
    monkeypatch.setenv("RANK", rank)
    slept = []
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    with pytest.raises(SystemExit) as ended:
        cli.main(["nonsense"])
    assert ended.value.code == 2
    assert slept == waited
    assert capsys.readouterr().err.startswith("gptfast: unknown command 'nonsense'")
