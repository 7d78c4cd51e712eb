import json
import re
from pathlib import Path

import pytest

from benchmarks.measuring.processes import RunError
from benchmarks.reporting import results
from benchmarks.vs_nanogpt import learning_curves
from tests.support.tiny_runs import TEXT


@pytest.fixture
def trained(quick, monkeypatch) -> list[list[str]]:
    """Runs made up, of three evaluations each: eager's losses, triton's a little above, another seed's far above."""
    commands: list[list[str]] = []

    def run(label, command, folder, threads):
        commands.append(command)
        above = {"eager": 0.0, "triton": 0.001}.get(label, 0.05)
        out = Path(command[command.index("--out") + 1])
        out.mkdir()
        entries = [{"step": 1, "loss": 4.0 + above, "grad_norm": 1.0}]
        entries += [{"step": s, "val_loss": 4.0 - s / 10 + above * (-1) ** s, "train_loss": 3.0} for s in (1, 2, 3)]
        (out / "log.jsonl").write_text("\n".join(map(json.dumps, entries)))
        (out / "summary.json").write_text(json.dumps({"backend": {"ffn": label}}))
        return "", 2.0

    monkeypatch.setattr(learning_curves, "run_process", run)
    return commands


def run(*arguments: str) -> None:
    learning_curves.main(["word-gpt", "--data", "sentences", "--device", "cpu", *arguments])


def test_runs_differ_only_in_option_and_seed(trained, tmp_path):
    run("--out", str(tmp_path), "--other-seed", "5", "--steps", "3")
    chosen = [command[command.index("--backend") : command.index("--data")] for command in trained]
    assert chosen == [
        ["--backend", "eager", "--seed=1337"],
        ["--backend", "triton", "--seed=1337"],
        ["--backend", "eager", "--seed=5"],
    ]
    for command in trained:
        assert command[1:9] == ["-m", "gptfast", "train", "word-gpt", "--device", "cpu", "--steps", "3"]
        assert command[command.index("--data") + 1] == "sentences"


def test_results_have_losses_and_differences_to_the_first(trained, tmp_path, capsys):
    run("--out", str(tmp_path), "--other-seed", "5")
    content = json.loads((tmp_path / "cpu/learning-word-gpt-backend.json").read_text())
    eager, triton, other = content["runs"]
    assert dict(learning_curves.differences(triton, eager)) == pytest.approx({1: -0.001, 2: 0.001, 3: -0.001})
    assert [entry["step"] for entry in other["losses"]] == [1]
    assert triton["backend"] == {"ffn": "triton"}
    printed = capsys.readouterr().out
    assert "| eager | 3.0000 | 3.7000 |  |  |" in printed
    assert "| triton | 3.0000 | 3.6990 | -0.0010 | 0.0010 |" in printed
    assert "| eager, another seed | 3.0000 | 3.6500 | -0.0500 | 0.0500 |" in printed
    assert "gptfast train word-gpt --device cpu --backend eager --seed=1337 --data sentences --out RUN" in printed
    assert (tmp_path / "cpu/learning-word-gpt-backend.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in (tmp_path / "cpu").iterdir()} == {
        "learning-word-gpt-backend.json",
        "learning-word-gpt-backend.png",
    }


def test_report_accepts_the_file(trained, tmp_path):
    run("--out", str(tmp_path))
    loaded = results.load(tmp_path / "cpu/learning-word-gpt-backend.json")
    assert loaded.rows.empty


def test_differences_skip_evaluations_of_one_run():
    first = {"evaluations": [{"step": 2, "val_loss": 3.0}]}
    run = {"evaluations": [{"step": 1, "val_loss": 9.0}, {"step": 2, "val_loss": 3.5}]}
    assert learning_curves.differences(run, first) == [(2, 0.5)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--option", "seed"], "'seed'"),
        (["--option", "--dtype"], ""),
        (["--values", "eager", "eager"], "--values .* eager eager"),
        (["--other-seed", "1337"], "--other-seed .* 1337"),
        (["--backend", "eager"], "--backend .* --values"),
        (["--option", "residual-dtype", "--residual_dtype=float32"], "--residual-dtype"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_bad_arguments_are_one_line(trained, tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        run("--out", str(tmp_path / "results"), *arguments)
    assert ended.value.code == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "results").exists()
    assert trained == []


def test_unknown_recipe_is_an_error(trained, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        learning_curves.main(["nonsense", "--data", "sentences", "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert re.search("'nonsense'.*shakespeare-char", capsys.readouterr().err)


def test_run_that_fails_is_an_error(quick, monkeypatch, tmp_path, capsys):
    def fail(label, *_):
        raise RunError(f"{label} failed with exit status 2; its last lines:")

    monkeypatch.setattr(learning_curves, "run_process", fail)
    with pytest.raises(SystemExit) as ended:
        run("--out", str(tmp_path))
    assert ended.value.code == 1
    assert "benchmarks.vs_nanogpt.learning_curves: eager failed with exit status 2" in capsys.readouterr().err
    assert list((tmp_path / "cpu").iterdir()) == []


def test_equal_values_learn_the_same(quick, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)  # a name relative to here, for processes that run elsewhere
    small = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--eval-batches", "2"]
    arguments = ["shakespeare-char-cpu", "--data", "text.txt", "--device", "cpu", "--threads", "1", "--out", "results"]
    values = ["--option", "learning-rate", "--values", "0.001", "1e-3", "--other-seed", "2"]
    learning_curves.main([*arguments, *values, *small, "--steps", "4", "--eval-interval", "2", "--log-interval", "1"])
    content = json.loads(Path("results/cpu/learning-shakespeare-char-cpu-learning-rate.json").read_text())
    first, same, other = content["runs"]
    assert [entry["step"] for entry in first["losses"]] == [1, 2, 3, 4]
    assert same["losses"] == first["losses"]
    assert same["evaluations"] == first["evaluations"]
    assert other["losses"] != first["losses"]
