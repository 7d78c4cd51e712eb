import json
from pathlib import Path

import pytest

from benchmarks.measuring import machine
from benchmarks.measuring.processes import RunError
from benchmarks.reporting import results
from benchmarks.vs_nanogpt import compare
from benchmarks.vs_nanogpt.runs import GPTFAST, NANOGPT, Outcome, Plan
from tests.support.nanogpt import TEXT


class Fake:
    """Both sides made up: nanoGPT always at 100 tokens/s, gptfast at other speeds each time."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.calls = fails, []
        self.speeds = iter([200.0, 500.0, 300.0, 400.0, 100.0] * 2)

    def __call__(self, *arguments) -> "Fake":
        self.made_with = arguments
        return self

    vocab_size, text = 18, TEXT

    def require_length(self, recipe) -> None:
        if "too short" in self.fails:
            raise ValueError(self.fails)

    def checksums(self):
        return {"train.py": "0" * 64}

    def nanogpt(self, recipe, plan):
        return self._run(NANOGPT, recipe, plan, 100.0, 1.9)

    def gptfast(self, recipe, plan):
        speed = 50.0 if plan.eval_batches else next(self.speeds)
        return self._run(GPTFAST, recipe, plan, speed, 1.85)

    def _run(self, side, recipe, plan, speed, val_loss):
        self.calls.append((side, recipe.preset, plan))
        if plan.eval_batches and "loss" in self.fails:
            raise RunError(self.fails)
        return Outcome(speed, val_loss, 1.7, 9.0) if plan.eval_batches else Outcome(speed, None, None, 9.0)


def test_turns_alternate_and_ratios_are_of_each_round(capsys):
    fake = Fake()
    speed = compare.compare_speed(fake, "cpu", 20, 5)
    sides = [side for side, _, _ in fake.calls]
    assert sides == [NANOGPT, GPTFAST, GPTFAST, NANOGPT] * 2 + [NANOGPT, GPTFAST]
    assert {plan for _, _, plan in fake.calls} == {Plan(20)}
    assert [one["ratio"] for one in speed["rounds"]] == [2.0, 5.0, 3.0, 4.0, 1.0]
    assert speed["rounds"][1]["order"] == [GPTFAST, NANOGPT]
    assert speed["ratio"] == pytest.approx({"p20": 1.8, "median": 3.0, "p80": 4.2})
    assert speed["tokens_per_second"][NANOGPT]["median"] == 100.0
    assert speed["tokens_per_second"][GPTFAST]["median"] == 300.0
    assert "cpu, round 2 of 5: gptfast 500 tokens/s, nanoGPT 100 tokens/s" in capsys.readouterr().out


@pytest.fixture
def quick(monkeypatch):
    """No time is spent on the limits of this machine."""
    known = {"device": "made up", "slug": "cpu", "kind": "cpu", "torch": "2", "gptfast": "0", "python": "3"}
    peak = {"name": None, "flops": {}, "bandwidth": None, "source": None}
    monkeypatch.setattr(machine, "describe", lambda device: known | {"threads": 2, "peak": peak})
    limits = {"copy_bytes_per_second": 1.0, "matrix_flops_per_second": {"float32": 1.0}}
    monkeypatch.setattr(machine, "measure_limits", lambda device: limits)


def measured(fake: Fake, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(compare, "Runs", fake)
    compare.main(["--nanogpt", "nano", "--data", "text.txt", *arguments])


def test_results_are_written_beside_the_others(quick, monkeypatch, tmp_path, capsys):
    other = tmp_path / "cpu/bench.json"
    other.parent.mkdir()
    other.write_text("{}")
    fake = Fake()
    measured(fake, monkeypatch, "--out", str(tmp_path), "--rounds", "3")
    assert {path.name for path in other.parent.iterdir()} == {"bench.json", "recipes.json"}
    assert other.read_text() == "{}"
    assert fake.made_with[1:] == (Path("nano"), Path("text.txt"), "cpu", None)

    path = tmp_path / "cpu/recipes.json"
    run = results.load_file(path)  # a report can be made with it in the folder
    assert (run.machine.device, run.rows, run.problems) == ("made up", (), ())
    content = json.loads(path.read_text())
    assert list(content["recipes"]) == ["cpu", "char"]
    cpu, char = content["recipes"].values()
    assert cpu["settings"]["preset"] == "shakespeare-char-cpu"
    chosen = ("rounds", "steps", "loss_steps", "eval_batches")
    assert [cpu["settings"][name] for name in chosen] == [3, 200, 2000, 200]
    assert [char["settings"][name] for name in chosen] == [3, 6, 300, 20]
    assert cpu["settings"]["dtype"][NANOGPT] == "float32"
    assert "--max_iters=199" in cpu["commands"]["speed"][NANOGPT]
    assert "--steps 300" in char["commands"]["loss"][GPTFAST]
    assert [one["ratio"] for one in cpu["speed"]["rounds"]] == [2.0, 5.0, 3.0]
    assert cpu["loss"][NANOGPT] == {"val_loss": 1.9, "train_loss": 1.7}
    assert cpu["loss"]["difference"] == pytest.approx(-0.05)
    assert content["data"]["characters"] == len(TEXT)

    printed = capsys.readouterr().out
    cells = "cpu | 100 | 300 | 3.00\N{MULTIPLICATION SIGN} | 2.40\N{MULTIPLICATION SIGN} to 4.20\N{MULTIPLICATION SIGN}"
    assert f"| {cells} | 1.9000 | 1.8500 | -0.0500 |" in printed
    assert printed.endswith(f"\n{path}\n")


def test_the_runs_for_the_loss_can_be_left_out(quick, monkeypatch, tmp_path, capsys):
    fake = Fake()
    short = ["--recipes", "char", "--rounds", "1", "--steps", "3", "--loss-steps", "0"]
    measured(fake, monkeypatch, "--out", str(tmp_path), *short)
    content = json.loads((tmp_path / "cpu/recipes.json").read_text())
    assert list(content["recipes"]) == ["char"]
    assert content["recipes"]["char"]["loss"] is content["recipes"]["char"]["commands"]["loss"] is None
    assert {plan for _, _, plan in fake.calls} == {Plan(3)}
    assert capsys.readouterr().out.count("| — | — | — |") == 1


def test_what_was_measured_stays_when_a_later_run_fails(quick, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        measured(Fake("a loss that failed"), monkeypatch, "--out", str(tmp_path), "--rounds", "1")
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "benchmarks.vs_nanogpt.compare: a loss that failed\n"
    content = json.loads((tmp_path / "cpu/recipes.json").read_text())
    assert content["recipes"]["cpu"]["speed"]["ratio"]["median"] == 2.0
    assert content["recipes"]["cpu"]["loss"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--recipes", "cpu", "gpu"], "unknown recipe 'gpu'; accepted: cpu, char"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--steps", "1"], "--steps must be at least 2, got 1"),
        (["--eval-batches", "0"], "--eval-batches must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--loss-steps", "100"], "--loss-steps must be 0 or more than the 100 of the warm-up, got 100"),
        (["--device", "tpu"], "no device 'tpu' here; accepted: "),
        (["--nanogpt", "{nothing}"], "no such folder: {nothing}; --nanogpt takes a checkout of nanoGPT"),
        (["--nanogpt", "{empty}"], "{empty} has no train.py; --nanogpt takes a checkout of nanoGPT"),
        (["--data", "{nothing}"], "no such file: {nothing}; --data takes a text file"),
        (["--data", "{empty}"], "no such file: {empty}; --data takes a text file"),
        (["--data", "{binary}"], "{binary} is not UTF-8 text"),
        (["--data", "{short}"], "{short} is too short: 10 characters to validate on, shakespeare-char-cpu needs more"),
        (["--out", "{short}"], "cannot write {short}/cpu/recipes.json: {short} is no folder that can be written to"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_said_in_one_line(arguments, said, quick, checkout, text, tmp_path, capsys):
    places = {name: str(tmp_path / name) for name in ("nothing", "empty", "binary", "short", "out")}
    Path(places["empty"]).mkdir()
    Path(places["binary"]).write_bytes(b"\xff\xfe\x00")
    Path(places["short"]).write_text(TEXT[:100])
    given = dict(zip(arguments[::2], arguments[1::2], strict=True)) if arguments[0] in ("--nanogpt", "--data") else {}
    defaults = {"--nanogpt": str(checkout), "--data": str(text), "--out": places["out"]} | given
    defaults |= {"--out": arguments[1]} if arguments[0] == "--out" else {}
    words = [word.format(**places) for pair in defaults.items() for word in pair]
    rest = [] if arguments[0] in defaults else arguments
    with pytest.raises(SystemExit) as stopped:
        compare.main([*words, *rest])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"benchmarks.vs_nanogpt.compare: {said.format(**places)}")
    assert error.count("\n") == 1
    assert not Path(places["out"]).exists()


def test_a_run_that_fails_leaves_nothing(quick, checkout, text, tmp_path, capsys):
    (checkout / "train.py").write_text("raise SystemExit('no GPU here')")
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--nanogpt", str(checkout), "--data", str(text), "--out", str(out)])
    assert stopped.value.code == 1
    said = "benchmarks.vs_nanogpt.compare: nanoGPT failed with exit status 1; its last lines:\n    no GPU here\n"
    assert capsys.readouterr().err == said
    assert not out.exists()


def test_an_interrupt_is_one_line(monkeypatch, tmp_path, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        measured(interrupted, monkeypatch, "--out", str(tmp_path))
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "benchmarks.vs_nanogpt.compare: interrupted\n"


@pytest.mark.slow
def test_both_train(nanogpt, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} and {number + 1} are {2 * number + 1}.\n" for number in range(5000)))
    command = ["--nanogpt", str(nanogpt), "--data", str(text), "--out", str(tmp_path / "out"), "--recipes", "cpu"]
    compare.main([*command, "--rounds", "2", "--steps", "5", "--loss-steps", "120", "--eval-batches", "5"])
    result = json.loads((tmp_path / "out/cpu/recipes.json").read_text())["recipes"]["cpu"]
    assert all(one[side] > 0 for one in result["speed"]["rounds"] for side in (NANOGPT, GPTFAST))
    assert abs(result["loss"]["difference"]) < 0.3  # both learn it, from 2.9
    assert result["loss"][GPTFAST]["val_loss"] < 2.5
