import dataclasses
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import tyro

import gptfast.training.recipes
from benchmarks.measuring.processes import RunError
from benchmarks.reporting import results
from benchmarks.vs_nanogpt import compare
from benchmarks.vs_nanogpt.compare import CONFIG, GPTFAST, NANOGPT, RECIPES, Outcome, Race, Run
from gptfast import tokenizers
from gptfast.data import batches
from gptfast.training.config import TrainConfig
from tests.support.nanogpt import TEXT, TRAIN

CPU = RECIPES["cpu"]
README = (
    "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 "
    "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
# output of train.py for six steps with an evaluation after every third
PRINTED = """\
Overriding config with config/train_shakespeare_char.py:
eval_interval = 250 # keep frequent because we'll overfit
Overriding: max_iters = 6
tokens per iteration will be: 768
found vocab_size = 65 (inside data/shakespeare_char/meta.pkl)
Initializing a new model from scratch
number of parameters: 0.80M
num decayed parameter tensors: 18, with 802,944 parameters
num non-decayed parameter tensors: 9, with 1,152 parameters
using fused AdamW: False
step 0: train loss 4.1667, val loss 4.1817
iter 0: loss 4.1828, time 135.30ms, mfu -100.00%
iter 1: loss 4.1656, time 52.93ms, mfu -100.00%
iter 2: loss 4.1197, time 51.63ms, mfu -100.00%
step 3: train loss 4.0666, val loss 4.0925
saving checkpoint to out-shakespeare-char
iter 3: loss 4.0581, time 125.41ms, mfu -100.00%
iter 4: loss 4.0312, time 53.98ms, mfu -100.00%
iter 5: loss 3.9713, time 52.64ms, mfu 0.02%
step 6: train loss 3.8982, val loss 3.9072
saving checkpoint to out-shakespeare-char
iter 6: loss 3.9089, time 119.64ms, mfu 0.02%
"""
SUMMARY = {"steps": 6, "tokens_per_second": 30_000.0, "val_loss": 3.9, "train_loss": 3.8}


def cpu_run(steps: int, eval_batches: int = 0) -> Run:
    return Run(CPU, "cpu", steps, eval_batches)


def parsed(printed: str = PRINTED) -> Outcome:
    return compare.nanogpt_outcome(printed, cpu_run(6, 2), 1.5)


def test_nanogpt_outcome_reads_speed_and_losses():
    outcome = parsed()
    assert outcome.tokens_per_second == pytest.approx(4 * 768 / (0.05293 + 0.05163 + 0.05398 + 0.05264))
    assert (outcome.val_loss, outcome.train_loss, outcome.seconds) == (3.9072, 3.8982, 1.5)


def test_nanogpt_outcome_takes_the_lowest_validation_loss():
    outcome = parsed(PRINTED.replace("val loss 3.9072", "val loss 4.2"))
    assert (outcome.val_loss, outcome.train_loss) == (4.0925, 4.0666)


@pytest.mark.parametrize(("time", "counts"), [("135.30", False), ("125.41", False), ("119.64", False), ("53.98", True)])
def test_nanogpt_outcome_skips_the_first_iteration_and_evaluations(time, counts):
    changed = parsed(PRINTED.replace(f"time {time}ms", "time 99999.00ms"))
    assert (changed.tokens_per_second != parsed().tokens_per_second) == counts


def test_both_sides_time_the_same_steps():
    """All but the first, which gptfast's trainer leaves out itself."""
    times = [f"iter {number}: loss 2.5, time {1000 if number == 0 else 10}.00ms, mfu 0%" for number in range(5)]
    printed = "\n".join(["tokens per iteration will be: 768", "step 0: train loss 4.1, val loss 4.1", *times])
    run = cpu_run(5)
    assert compare.nanogpt_outcome(printed, run, 1.5) == Outcome(pytest.approx(768 / 0.01), 1.5)
    assert settings_of(run)["max_iters"] == "4"
    assert trained(run).steps == 5


@pytest.mark.parametrize(
    ("pattern", "new", "said"),
    [
        ("iter 4", "iteration 4", "6 iterations; 7 "),
        ("will be: 768", "will be: 1,536", "1,536 tokens, .* 768"),
        ("will be: 768", "will be", "an unknown number of tokens"),
        (r"val loss \S+", "val loss nan", "loss of nanoGPT is nan"),
        ("step 6:", "steps:", "no loss of step 6"),
        ("$", "\n".join(["", *(f"step {at}: train loss 4.0, val loss 4.0" for at in (1, 2, 4, 5))]), "no iteration"),
    ],
)
def test_nanogpt_outcome_rejects_output_of_another_run(pattern, new, said):
    changed = re.sub(pattern, new, PRINTED)
    assert changed != PRINTED
    with pytest.raises(RunError, match=said):
        parsed(changed)


def test_gptfast_outcome_reads_the_summary():
    assert compare.gptfast_outcome(SUMMARY, cpu_run(6, 2), 9.0) == Outcome(30_000.0, 9.0, 3.9, 3.8)
    assert compare.gptfast_outcome(SUMMARY, cpu_run(6), 9.0) == Outcome(30_000.0, 9.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 5}, "5 steps; 6 "),
        ({"tokens_per_second": None}, "speed of gptfast is None"),
        ({"val_loss": None}, "loss of gptfast is None"),
    ],
)
def test_gptfast_outcome_rejects_incomplete_summaries(change, said):
    with pytest.raises(RunError, match=said):
        compare.gptfast_outcome(SUMMARY | change, cpu_run(6, 2), 9.0)


def settings_of(run: Run) -> dict[str, str]:
    command = run.nanogpt_command()
    assert command[:2] == ["train.py", CONFIG]
    return dict(word.removeprefix("--").split("=") for word in command[2:])


def trained(run: Run) -> TrainConfig:
    """Config that `gptfast train` parses from its command."""
    word, preset, *options = run.gptfast_command("text.txt", "run")
    assert word == "train"
    return tyro.cli(TrainConfig, args=options, default=gptfast.training.recipes.RECIPES[preset])


@pytest.mark.parametrize("name", RECIPES)
def test_nanogpt_command_is_its_readme_s(name):
    readme = dict(word.removeprefix("--").split("=") for word in README.split()) if name == "cpu" else {}
    fixed = readme | {"device": "cpu", "compile": "False", "dtype": "float32", "log_interval": "1"}
    recipe = RECIPES[name]
    assert settings_of(Run(recipe, "cpu", 7)) == fixed | {"max_iters": "6", "eval_interval": "7", "eval_iters": "1"}
    decay = {"max_iters": "2000", "lr_decay_iters": "2000", "eval_interval": "250", "eval_iters": "20"}
    assert settings_of(Run(recipe, "cpu", 2000, 20)) == fixed | decay
    short = settings_of(Run(recipe, "cuda:1", 300, 20))
    assert (short["eval_interval"], short["lr_decay_iters"], short["device"]) == ("300", "300", "cuda:1")


@pytest.mark.parametrize("name", RECIPES)
def test_gptfast_command_changes_only_length_and_evaluations(name):
    recipe = RECIPES[name]
    for steps, eval_batches, interval in ((7, 0, 7), (2000, 20, 250), (300, 20, 300)):
        config = trained(Run(recipe, "cpu", steps, eval_batches))
        expected = {"data": "text.txt", "out": "run", "device": "cpu", "steps": steps, "eval_interval": interval}
        assert config == dataclasses.replace(recipe.config, **expected, eval_batches=eval_batches or 1)


def test_both_sides_train_the_same_model():
    theirs, model = CPU.settings, CPU.config.model
    for name in ("block_size", "n_layer", "n_head", "n_embd", "dropout"):
        assert getattr(model, name) == theirs[name]
    assert (CPU.config.batch_size, CPU.config.steps) == (theirs["batch_size"], theirs["max_iters"])


def test_nanogpt_reads_gptfast_s_tokens(tmp_path):
    vocab_size, held_out = compare.write_tokens(TEXT, tmp_path / "data")
    tokenizer = tokenizers.for_documents("char", [TEXT])
    parts = batches.split_tokens(tokenizer.encode(TEXT).astype(np.uint16), 64, 0.1)
    for name, part in zip(("train", "val"), parts, strict=True):
        written = np.fromfile(tmp_path / "data" / f"{name}.bin", dtype=np.uint16)
        assert written.tolist() == part.tokens.windows(np.array([0]), len(part.tokens))[0].tolist()
    assert held_out == len(parts[1].tokens)
    assert pickle.loads((tmp_path / "data/meta.pkl").read_bytes())["vocab_size"] == vocab_size == tokenizer.vocab_size


@pytest.fixture
def race(tmp_path, checkout, text) -> Race:
    (tmp_path / "work").mkdir()
    return Race(tmp_path / "work", checkout, text, 3)


def test_nanogpt_runs_in_a_copy_with_the_threads(race, checkout, monkeypatch):
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    outcome = race.run(NANOGPT, cpu_run(4))
    assert outcome == Outcome(pytest.approx(76_800), outcome.seconds)
    assert outcome.seconds > 0
    assert race.run(NANOGPT, cpu_run(500, 20)).val_loss == 2.5
    assert (race.nanogpt_folder / "threads").read_text() == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    race.threads = None
    race.run(NANOGPT, cpu_run(4))
    assert (race.nanogpt_folder / "threads").read_text() == "2", "the environment decides"
    assert {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (TRAIN.replace("found vocab_size = 18", "found vocab_size = 50304"), "vocab_size = 18"),
        ("import sys\nfor i in range(20): print(i, file=sys.stderr)\nsys.exit(3)", "status 3; .*\n    12\n.*\n    19$"),
    ],
)
def test_nanogpt_that_fails_is_an_error(race, script, said):
    (race.nanogpt_folder / "train.py").write_text(script)
    with pytest.raises(RunError, match=f"(?s)^nanoGPT.*{said}"):
        race.run(NANOGPT, cpu_run(4))


def test_gptfast_that_fails_is_an_error(race):
    nonsense = dataclasses.replace(CPU, preset="nonsense")
    with pytest.raises(RunError, match=r"(?s)gptfast failed with exit status 2; .*nonsense"):
        race.run(GPTFAST, Run(nonsense, "cpu", 4))


def test_gptfast_runs_in_folders_that_are_removed(race, monkeypatch):
    folders = []

    def run(name, command, folder, threads):
        out = Path(command[command.index("--out") + 1])
        folders.append(out)
        out.mkdir()
        (out / "summary.json").write_text(json.dumps(SUMMARY))
        return "", 2.0

    monkeypatch.setattr(compare, "run_process", run)
    assert race.run(GPTFAST, cpu_run(6)) == race.run(GPTFAST, cpu_run(6)) == Outcome(30_000.0, 2.0)
    assert len(set(folders)) == 2
    assert not any(folder.exists() for folder in folders)
    monkeypatch.setattr(compare, "run_process", lambda *_: ("", 2.0))
    with pytest.raises(RunError, match=r"summary\.json"):
        race.run(GPTFAST, cpu_run(6))


class FakeRace:
    """Both sides made up: nanoGPT always at 100 tokens/s, gptfast at another speed each time."""

    vocab_size, held_out, text = 18, 860, TEXT

    def __init__(self, loss_fails: str = "") -> None:
        self.loss_fails, self.calls = loss_fails, []
        self.speeds = iter([200.0, 500.0, 300.0, 400.0, 100.0] * 2)

    def __call__(self, *arguments) -> "FakeRace":
        self.made_with = arguments
        return self

    def checksums(self):
        return {"train.py": "0" * 64}

    def run(self, side, run):
        self.calls.append((side, run))
        if not run.eval_batches:
            return Outcome(100.0 if side == NANOGPT else next(self.speeds), 9.0)
        if self.loss_fails:
            raise RunError(self.loss_fails)
        return Outcome(50.0, 9.0, 1.9 if side == NANOGPT else 1.85, 1.7)


def test_compare_speed_alternates_turns(capsys):
    fake = FakeRace()
    speed = compare.compare_speed(fake, "cpu", cpu_run(20), 5)
    assert [side for side, _ in fake.calls] == [NANOGPT, GPTFAST, GPTFAST, NANOGPT] * 2 + [NANOGPT, GPTFAST]
    assert all(run == cpu_run(20) for _, run in fake.calls)
    assert [one["ratio"] for one in speed["rounds"]] == [2.0, 5.0, 3.0, 4.0, 1.0]
    assert speed["rounds"][1]["order"] == [GPTFAST, NANOGPT]
    assert speed["ratio"] == pytest.approx({"p20": 1.8, "median": 3.0, "p80": 4.2})
    assert {side: speed["tokens_per_second"][side]["median"] for side in (NANOGPT, GPTFAST)} == {
        NANOGPT: 100.0,
        GPTFAST: 300.0,
    }
    assert "cpu, round 2 of 5: gptfast 500 tokens/s, nanoGPT 100 tokens/s" in capsys.readouterr().out


def measure(fake: FakeRace, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(compare, "Race", fake)
    compare.main(["--nanogpt", "nano", "--data", "text.txt", *arguments])


def test_results_are_written_beside_others(quick, monkeypatch, tmp_path, capsys):
    other = tmp_path / "cpu/bench.json"
    other.parent.mkdir()
    other.write_text("{}")
    fake = FakeRace()
    measure(fake, monkeypatch, "--out", str(tmp_path), "--rounds", "3")
    assert {path.name for path in other.parent.iterdir()} == {"bench.json", "recipes.json"}
    assert other.read_text() == "{}"
    assert fake.made_with[1:] == (Path("nano"), Path("text.txt"), None)

    path = tmp_path / "cpu/recipes.json"
    assert results.load(path).rows.empty  # the report accepts the file
    content = json.loads(path.read_text())
    assert list(content["recipes"]) == ["cpu", "char"]
    cpu, char = content["recipes"].values()
    assert cpu["settings"]["preset"] == "shakespeare-char-cpu"
    chosen = ("rounds", "steps", "loss_steps", "eval_batches")
    assert [cpu["settings"][name] for name in chosen] == [3, 200, 2000, 200]
    assert [char["settings"][name] for name in chosen] == [3, 6, 300, 20]
    assert cpu["settings"]["dtype"][NANOGPT] == "float32"
    assert cpu["commands"]["speed"][NANOGPT].startswith(f"python train.py {CONFIG} --device=cpu ")
    assert "--max_iters=199" in cpu["commands"]["speed"][NANOGPT]
    ours = "gptfast train shakespeare-char-gpu --data FILE --out RUN --device cpu --steps 300"
    assert char["commands"]["loss"][GPTFAST].startswith(ours)
    assert [one["ratio"] for one in cpu["speed"]["rounds"]] == [2.0, 5.0, 3.0]
    assert cpu["loss"][NANOGPT] == {"val_loss": 1.9, "train_loss": 1.7}
    assert cpu["loss"]["difference"] == pytest.approx(-0.05)
    assert content["data"]["characters"] == len(TEXT)

    printed = capsys.readouterr().out
    cells = "cpu | 100 | 300 | 3.00\N{MULTIPLICATION SIGN} | 2.40\N{MULTIPLICATION SIGN} to 4.20\N{MULTIPLICATION SIGN}"
    assert f"| {cells} | 1.9000 | 1.8500 | -0.0500 |" in printed
    assert printed.endswith(f"\n{path}\n")


def test_loss_can_be_skipped(quick, monkeypatch, tmp_path, capsys):
    fake = FakeRace()
    short = ["--recipes", "char", "--rounds", "1", "--steps", "3", "--loss-steps", "0"]
    measure(fake, monkeypatch, "--out", str(tmp_path), *short)
    content = json.loads((tmp_path / "cpu/recipes.json").read_text())
    assert list(content["recipes"]) == ["char"]
    assert content["recipes"]["char"]["loss"] is content["recipes"]["char"]["commands"]["loss"] is None
    assert {(run.steps, run.eval_batches) for _, run in fake.calls} == {(3, 0)}
    assert capsys.readouterr().out.count("| — | — | — |") == 1


def test_results_survive_a_later_failure(quick, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        measure(FakeRace("a loss that failed"), monkeypatch, "--out", str(tmp_path), "--rounds", "1")
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "benchmarks.vs_nanogpt.compare: a loss that failed\n"
    content = json.loads((tmp_path / "cpu/recipes.json").read_text())
    assert content["recipes"]["cpu"]["speed"]["ratio"]["median"] == 2.0
    assert content["recipes"]["cpu"]["loss"] is None


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--recipes", "gpu", "'gpu'; accepted: cpu, char"),
        ("--rounds", "0", "--rounds must be at least 1, got 0"),
        ("--steps", "1", "--steps must be at least 2, got 1"),
        ("--eval-batches", "0", "--eval-batches must be at least 1, got 0"),
        ("--threads", "0", "--threads must be at least 1, got 0"),
        ("--loss-steps", "-1", "--loss-steps must be at least 0, got -1"),
        ("--loss-steps", "100", "--loss-steps must be 0 or more than .*100.*, got 100"),
        ("--device", "tpu", "'tpu'"),
        ("--nanogpt", "{nothing}", "{nothing}"),
        ("--nanogpt", "{empty}", "{empty} has no train.py"),
        ("--data", "{nothing}", "{nothing}"),
        ("--data", "{empty}", "{empty}"),
        ("--data", "{binary}", "{binary}"),
        ("--data", "{short}", "{short} is too short: 10 characters .* shakespeare-char-cpu"),
        ("--out", "{short}", "{short}/cpu/recipes.json"),
    ],
)
def test_bad_arguments_are_one_line(option, value, said, quick, checkout, text, tmp_path, capsys):
    places = {name: str(tmp_path / name) for name in ("nothing", "empty", "binary", "short", "out")}
    Path(places["empty"]).mkdir()
    Path(places["binary"]).write_bytes(b"\xff\xfe\x00")
    Path(places["short"]).write_text(TEXT[:100])
    arguments = {"--nanogpt": str(checkout), "--data": str(text), "--out": places["out"]}
    arguments[option] = value.format(**places)
    with pytest.raises(SystemExit) as stopped:
        compare.main([word for pair in arguments.items() for word in pair])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert re.match(f"benchmarks.vs_nanogpt.compare: .*{said.format(**places)}.*\n$", error)
    assert not Path(places["out"]).exists()


def test_run_that_fails_leaves_nothing(quick, checkout, text, tmp_path, capsys):
    (checkout / "train.py").write_text("raise SystemExit('no GPU here')")
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--nanogpt", str(checkout), "--data", str(text), "--out", str(out)])
    assert stopped.value.code == 1
    assert "no GPU here" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_both_sides_train(nanogpt, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} and {number + 1} are {2 * number + 1}.\n" for number in range(5000)))
    command = ["--nanogpt", str(nanogpt), "--data", str(text), "--out", str(tmp_path / "out"), "--recipes", "cpu"]
    compare.main([*command, "--rounds", "2", "--steps", "5", "--loss-steps", "120", "--eval-batches", "5"])
    result = json.loads((tmp_path / "out/cpu/recipes.json").read_text())["recipes"]["cpu"]
    assert all(one[side] > 0 for one in result["speed"]["rounds"] for side in (NANOGPT, GPTFAST))
    assert abs(result["loss"]["difference"]) < 0.3  # both learn it, from 2.9
    assert result["loss"][GPTFAST]["val_loss"] < 2.5


def test_settings_are_those_of_the_checkout(nanogpt):
    """Names that train.py has, and values of gptfast's preset in the recipe's file."""
    train, config = ((nanogpt / name).read_text(encoding="utf-8") for name in ("train.py", CONFIG))
    for recipe in RECIPES.values():
        for name in settings_of(Run(recipe, "cpu", 300, 20)):
            assert f"\n{name} = " in train
    values: dict = {}
    exec(config, values)
    ours = RECIPES["char"].config
    for name in ("block_size", "n_layer", "n_head", "n_embd", "dropout"):
        assert getattr(ours.model, name) == values[name]
    same = ("batch_size", "learning_rate", "beta2", "eval_interval")
    renamed = {"min_learning_rate": "min_lr", "warmup_steps": "warmup_iters", "steps": "max_iters"}
    for name, theirs in (dict(zip(same, same, strict=True)) | renamed).items():
        assert getattr(ours, name) == values[theirs]
    for name in ("weight_decay", "beta1", "grad_clip"):  # train.py's own
        assert name not in values
        assert float(re.search(rf"^{name} = (\S+)", train, re.MULTILINE)[1]) == getattr(ours, name)
