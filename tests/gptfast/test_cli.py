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


def train(*options: str) -> None:
    cli.main(["train", "shakespeare-char", "--data", "text.txt", "--device", "cpu", *TINY, *options])


def gptfast(*arguments: str) -> subprocess.CompletedProcess:
    """Run the command line in a process."""
    command = [sys.executable, "-m", "gptfast", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_cli_trains_and_generates(text):
    trained = gptfast("train", "shakespeare-char", "--data", text, "--out", "run", "--device", "cpu", *TINY)
    assert trained.returncode == 0, trained.stderr
    assert "validation loss" in trained.stdout
    assert trained.stdout.splitlines()[-1] == "gptfast generate run"
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["steps"] == 20
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


def test_cli_starts_without_the_compiler():
    """Its import takes longer than everything else."""
    code = "import sys; from gptfast import cli; print({'torch._dynamo', 'torch._inductor'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def fails(capsys, *arguments: str, status: int = 2) -> str:
    """Run a command that must fail; returns its one line of error."""
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
        (["--data", "missing.txt"], r"'missing\.txt'.*stdlib, shakespeare, chatbot, "),
        (["--data", "empty.txt"], "empty.txt is empty"),
        (["--block-size", "400"], "1720 tokens .*block_size=400"),
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
    Path("taken").mkdir()
    Path("taken/file").touch()
    before = sorted(Path().rglob("*"))
    assert re.search(message, fails(capsys, "train", "shakespeare-char", "--data", text, *options))
    assert sorted(Path().rglob("*")) == before, "a run folder was left behind"


def test_train_takes_the_last_device(text, monkeypatch, capsys):
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
def test_parser_errors_without_a_box_are_one_line(monkeypatch, capsys, printed, message):
    def refuse(*arguments, **options):
        sys.stderr.write(printed)
        sys.exit(2)

    monkeypatch.setattr("tyro.cli", refuse)
    assert fails(capsys, "generate", "run") == message


def test_cli_rejects_unknown_words(capsys):
    assert re.search("'gpt5'.*shakespeare-char, ", fails(capsys, "train", "gpt5"))
    assert re.search("'sing'.*prepare, train, generate, eval, export, doctor", fails(capsys, "sing"))


@pytest.fixture
def trained(text) -> str:
    train("--out", "run", "--steps", "1")
    return "run"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "Zürich"], "'Zcü'"),
        (["--prompt", ""], "prompt is empty"),
        (["--temperature", "-1"], r"temperature .*got -1\.0"),
        (["--top-k", "0"], "top_k .*got 0"),
        (["--top-p", "1.5"], r"top_p .*got 1\.5"),
        (["--max-new-tokens", "-5"], "max_new_tokens .*got -5"),
        (["--num-samples", "0"], "num_samples .*got 0"),
        (["--seed", "-1"], "seed .*got -1"),
        (["--seed", "18446744073709551616"], "seed .*got 18446744073709551616"),
        (["--prompt-file", "none.txt"], r"none\.txt"),
        (["--json", "--stream"], "--json .*--stream"),
        (["--interactive", "--json"], "--interactive .*--json"),
        (["--device", "tpu"], "'tpu'.*auto, "),
        (["--backend", "cuda"], "backend 'cuda'.*auto, triton, "),
    ],
)
def test_generate_rejects_bad_options(trained, capsys, options, message):
    capsys.readouterr()
    assert re.search(message, fails(capsys, "generate", trained, *options))


def generated(capsys, *arguments: str) -> str:
    capsys.readouterr()
    cli.main(["generate", *arguments, "--device", "cpu"])
    return capsys.readouterr().out


def test_generate_streams_the_same_text(trained, capsys):
    options = [trained, "--prompt", "To", "--max-new-tokens", "20"]
    assert generated(capsys, *options, "--stream") == generated(capsys, *options)


def test_generate_reads_prompts_from_a_file_and_standard_input(trained, capsys, monkeypatch):
    Path("prompts.txt").write_text("To\nbe or\n")
    options = [trained, "--max-new-tokens", "5", "--temperature", "0", "--prompt-file"]
    lines = generated(capsys, *options, "prompts.txt", "--json").splitlines()
    found = [json.loads(line) for line in lines]
    assert [entry["prompt"] for entry in found] == ["To", "be or"]
    assert all(len(entry["tokens"]) == len(entry["log_probs"]) == len(entry["text"]) == 5 for entry in found)
    monkeypatch.setattr("sys.stdin", io.StringIO("To\nbe or\n"))
    assert generated(capsys, *options, "-", "--json").splitlines() == lines


def test_generate_asks_for_prompts(trained, capsys, monkeypatch, tmp_path):
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


def test_generate_ends_before_a_stop_string(trained, capsys):
    free = generated(capsys, trained, "--prompt", "To", "--max-new-tokens", "30")
    stop = free[10]
    text = generated(capsys, trained, "--prompt", "To", "--max-new-tokens", "30", "--stop", stop)
    assert text == free[: free.index(stop, 2)] + "\n"


def test_generate_needs_a_model(capsys):
    assert fails(capsys, "generate").startswith("Missing from gptfast generate: STR Run folder")


def test_generate_rejects_a_folder_without_a_model(tmp_path, capsys):
    assert fails(capsys, "generate", str(tmp_path)).endswith("is not a run folder with weights: it has no config.json")


def test_train_reports_a_loss_that_is_not_finite(text, capsys):
    with pytest.raises(SystemExit) as ended:
        train("--learning-rate", "1e30")
    assert ended.value.code == 1
    assert re.search(r"^gptfast: .*loss is (nan|inf) at step \d+; .*--learning-rate", capsys.readouterr().err, re.M)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 7.28 TiB for an array"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] err == 0. DefaultCPUAllocator: can't allocate memory: 4 bytes"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_train_reports_too_little_memory_and_leaves_no_folder(text, monkeypatch, capsys, error):
    before_step(monkeypatch, 0, raising(error))
    with pytest.raises(SystemExit) as ended:
        train("--out", "run")
    assert ended.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert re.match("gptfast: out of memory.* (Unable|CUDA|can't) .+", lines[-1])
    assert not Path("run").exists()


def test_train_reports_a_model_beyond_the_memory(text, capsys):
    options = ["--data", text, "--device", "cpu", "--n-embd", "1000000000000", "--n-head", "1", "--block-size", "16"]
    assert fails(capsys, "train", "shakespeare-char", *options, status=1).startswith("out of memory")


def test_cli_reports_errors_of_the_file_system(trained, monkeypatch, capsys):
    capsys.readouterr()
    too_long = "x" * 300
    assert "File name too long" in fails(capsys, "train", "shakespeare-char", "--data", too_long, status=1)
    assert "File name too long" in fails(capsys, "generate", too_long, status=1)

    full_disk = raising(OSError(28, "No space left on device"))
    monkeypatch.setattr("os.fsync", lambda descriptor: full_disk())
    error = fails(capsys, "train", "shakespeare-char", "--data", "text.txt", "--out", "full", status=1)
    assert error == "cannot write full/config.json: [Errno 28] No space left on device"
    assert not Path("full").exists()


def test_cli_reports_an_interrupt(trained, monkeypatch, capsys):
    capsys.readouterr()
    interrupt = raising(KeyboardInterrupt())
    monkeypatch.setattr("gptfast.generation.autoregressive.sample", lambda *arguments: interrupt())
    assert fails(capsys, "generate", trained, status=130) == "interrupted"


def test_interrupted_train_prints_how_to_continue(text, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        before_step(patched, 7, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(SystemExit) as ended:
            train("--out", "run")
    assert ended.value.code == 130
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("no evaluation yet after 8 steps in ")
    assert lines[-1] == "interrupted; to continue: gptfast train run"
    cli.main(lines[-1].split("gptfast ")[1].split())
    out = capsys.readouterr().out
    assert "continuing run after step 8" in out
    assert "after 20 steps" in out


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
    cli.main(["train", "shakespeare-char", "--config", "settings.json", "--print-config"])
    again = json.loads(capsys.readouterr().out)
    again["model"]["vocab_size"] = saved["model"]["vocab_size"]  # the tokenizer determines it
    assert again == saved | {"out": "again"}


def test_options_override_files_and_files_override_presets(text, capsys):
    Path("settings.toml").write_text("steps = 7\nseed = 3\n[model]\nn_layer = 2\n")
    cli.main(["train", "shakespeare-char-cpu", "--config=settings.toml", "--seed", "4", "--print-config"])
    printed = json.loads(capsys.readouterr().out)
    assert (printed["steps"], printed["seed"], printed["model"]["n_layer"], printed["batch_size"]) == (7, 4, 2, 12)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train"], ["train", "--help"]])
def test_cli_prints_its_usage(capsys, arguments):
    cli.main(arguments)
    assert capsys.readouterr().out.startswith("usage: gptfast prepare SOURCE")


@pytest.mark.parametrize("arguments", [["train", "shakespeare-char", "--help"], ["generate", "--help"]])
def test_help_lists_options(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0
    assert "--backend" in capsys.readouterr().out


@pytest.mark.parametrize(("rank", "waited"), [("0", []), ("1", [20.0])])
def test_other_ranks_report_bad_arguments_after_rank_0(monkeypatch, capsys, rank, waited):
    monkeypatch.setenv("RANK", rank)
    slept = []
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    with pytest.raises(SystemExit) as ended:
        cli.main(["nonsense"])
    assert ended.value.code == 2
    assert slept == waited
    assert capsys.readouterr().err.startswith("gptfast: unknown command 'nonsense'")
