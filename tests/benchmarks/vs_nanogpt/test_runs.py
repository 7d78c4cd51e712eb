import dataclasses
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

import gptfast.training.recipes
from benchmarks.measuring.processes import RunError
from benchmarks.vs_nanogpt import runs as recipe_runs
from benchmarks.vs_nanogpt.runs import CONFIG, GPTFAST, NANOGPT, RECIPES, Outcome, Plan, Runs
from gptfast import tokenizers
from gptfast.data import batches
from gptfast.training.config import TrainConfig
from tests.support.nanogpt import TEXT, TRAIN

CPU = RECIPES["cpu"]
README = (
    "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 "
    "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
# what train.py printed of six steps with an evaluation after every third
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


def parsed(printed: str = PRINTED, plan: Plan | None = None) -> Outcome:
    return recipe_runs.nanogpt_outcome(printed, CPU, plan or Plan(6, 2), 1.5)


def test_what_nanogpt_prints_is_read():
    outcome = parsed()
    assert outcome.tokens_per_second == pytest.approx(4 * 768 / (0.05293 + 0.05163 + 0.05398 + 0.05264))
    assert (outcome.val_loss, outcome.train_loss, outcome.seconds) == (3.9072, 3.8982, 1.5)


def test_the_lowest_validation_loss_counts_with_the_train_loss_beside_it():
    outcome = parsed(PRINTED.replace("val loss 3.9072", "val loss 4.2"))
    assert (outcome.val_loss, outcome.train_loss) == (4.0925, 4.0666)


@pytest.mark.parametrize(("time", "counts"), [("135.30", False), ("125.41", False), ("119.64", False), ("53.98", True)])
def test_the_first_iteration_and_those_with_an_evaluation_do_not_count(time, counts):
    changed = parsed(PRINTED.replace(f"time {time}ms", "time 99999.00ms"))
    assert (changed.tokens_per_second != parsed().tokens_per_second) == counts


def test_both_sides_time_the_same_steps_for_the_speed():
    """All but the first: gptfast's trainer leaves that out itself."""
    times = [f"iter {number}: loss 2.5, time {1000 if number == 0 else 10}.00ms, mfu 0%" for number in range(5)]
    printed = "\n".join(["tokens per iteration will be: 768", "step 0: train loss 4.1, val loss 4.1", *times])
    plan = Plan(5)
    assert len(times) == plan.steps == plan.iterations
    assert parsed(printed, plan) == Outcome(pytest.approx(768 / 0.01), None, None, 1.5)
    assert settings_of(recipe_runs.nanogpt_command(CPU, plan, "cpu"))["max_iters"] == "4"
    assert trained(CPU, plan).steps == 5


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("iter 4", "iteration 4", "nanoGPT printed the times of 6 iterations; 7 were asked for"),
        ("will be: 768", "will be: 1,536", "nanoGPT's batch is another: 1,536 tokens, gptfast's has 768"),
        ("will be: 768", "will be", "nanoGPT's batch is another: an unknown number of tokens"),
        ("val loss 3.9072", "val loss nan", "the loss of nanoGPT is nan"),
        ("step 6:", "steps:", "nanoGPT printed no loss of step 6"),
    ],
)
def test_output_of_another_run_is_refused(old, new, said):
    assert old in PRINTED
    changed = PRINTED.replace(old, new)
    if "nan" in new:
        changed = changed.replace("val loss 4.0925", "val loss nan").replace("val loss 4.1817", "val loss nan")
    with pytest.raises(RunError, match=said):
        parsed(changed)


def test_an_evaluation_before_every_iteration_leaves_no_time():
    printed = PRINTED + "".join(f"step {number}: train loss 4.0, val loss 4.0\n" for number in (1, 2, 4, 5))
    with pytest.raises(RunError, match="timed no iteration without an evaluation"):
        parsed(printed)


def test_gptfasts_summary_is_read():
    assert recipe_runs.gptfast_outcome(SUMMARY, Plan(6, 2), 9.0) == Outcome(30_000.0, 3.9, 3.8, 9.0)
    assert recipe_runs.gptfast_outcome(SUMMARY, Plan(6), 9.0) == Outcome(30_000.0, None, None, 9.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 5}, "gptfast did 5 steps; 6 were asked for"),
        ({"tokens_per_second": None}, "the speed of gptfast is None"),
        ({"val_loss": None}, "the loss of gptfast is None"),
    ],
)
def test_a_summary_that_lacks_something_is_refused(change, said):
    with pytest.raises(RunError, match=said):
        recipe_runs.gptfast_outcome(SUMMARY | change, Plan(6, 2), 9.0)


def settings_of(command: list[str]) -> dict[str, str]:
    assert command[:2] == ["train.py", CONFIG]
    assert len({word.split("=")[0] for word in command[2:]}) == len(command[2:])
    return dict(word.removeprefix("--").split("=") for word in command[2:])


def trained(recipe, plan: Plan) -> TrainConfig:
    """The settings that gptfast's command line makes of ours: it refuses names that it does not know."""
    train, preset, *options = recipe_runs.gptfast_command(recipe, plan, "cpu", "text.txt", "run")
    assert train == "train"
    known = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(TrainConfig)}
    assert set(options[::2]) <= known
    default = gptfast.training.recipes.recipe(preset, torch.device("cpu"))
    return tyro.cli(TrainConfig, args=options, default=default, config=(tyro.conf.OmitArgPrefixes,))


@pytest.mark.parametrize("name", RECIPES)
def test_nanogpt_is_asked_for_its_readmes_recipe(name):
    readme = dict(word.removeprefix("--").split("=") for word in README.split()) if name == "cpu" else {}
    run = {"device": "cpu", "compile": "False", "dtype": "float32", "log_interval": "1"}
    speed = settings_of(recipe_runs.nanogpt_command(RECIPES[name], Plan(7), "cpu"))
    assert speed == readme | run | {"max_iters": "6", "eval_interval": "7", "eval_iters": "1"}
    loss = settings_of(recipe_runs.nanogpt_command(RECIPES[name], Plan(2000, 20), "cpu"))
    decay = {"max_iters": "2000", "lr_decay_iters": "2000"}
    assert loss == readme | run | decay | {"eval_interval": "250", "eval_iters": "20"}
    short = settings_of(recipe_runs.nanogpt_command(RECIPES[name], Plan(300, 20), "cuda:1"))
    assert (short["eval_interval"], short["lr_decay_iters"], short["device"]) == ("300", "300", "cuda:1")


@pytest.mark.parametrize("name", RECIPES)
def test_gptfast_is_asked_for_the_same(name):
    recipe = RECIPES[name]
    for plan, interval, evaluated in ((Plan(7), 7, 1), (Plan(2000, 20), 250, 20), (Plan(300, 20), 300, 20)):
        config = trained(recipe, plan)
        assert (config.data, config.out, config.device) == ("text.txt", "run", "cpu")
        assert (config.steps, config.eval_interval, config.eval_batches) == (plan.steps, interval, evaluated)
        # and nothing else than the preset's own
        own = ("data", "out", "device", "steps", "eval_interval", "eval_batches")
        changed = dataclasses.replace(config, **{field: getattr(recipe.config, field) for field in own})
        assert changed == recipe.config


def test_both_train_the_same_model():
    theirs = CPU.nanogpt
    model = CPU.config.model
    for name in ("block_size", "n_layer", "n_head", "n_embd", "dropout"):
        assert getattr(model, name) == theirs[name]
    assert (CPU.config.batch_size, CPU.config.steps) == (theirs["batch_size"], theirs["max_iters"])


def test_commands_are_shown_as_one_would_type_them():
    shown = recipe_runs.shown(RECIPES["char"], Plan(300, 20), "cpu")
    assert shown[NANOGPT].startswith("python train.py config/train_shakespeare_char.py --device=cpu ")
    assert shown[GPTFAST].startswith(
        "gptfast train shakespeare-char-gpu --data FILE --out RUN --device cpu --steps 300"
    )


def test_nanogpt_reads_the_tokens_that_gptfast_makes(tmp_path):
    vocab_size, held_out = recipe_runs.write_tokens(TEXT, tmp_path / "data")
    tokenizer = tokenizers.for_documents("char", [TEXT])
    parts = batches.split_tokens(tokenizer.encode(TEXT).astype(np.uint16), 64, 0.1)
    for name, part in zip(("train", "val"), parts, strict=True):
        written = np.fromfile(tmp_path / "data" / f"{name}.bin", dtype=np.uint16)
        assert len(written) == len(part.tokens)
        assert written.tolist() == part.tokens.windows(np.array([0]), len(written))[0].tolist()
    assert held_out == len(parts[1].tokens)
    with open(tmp_path / "data/meta.pkl", "rb") as file:
        assert pickle.load(file)["vocab_size"] == vocab_size == tokenizer.vocab_size


@pytest.fixture
def runs(tmp_path, checkout, text) -> Runs:
    (tmp_path / "work").mkdir()
    return Runs(tmp_path / "work", checkout, text, "cpu", 3)


def test_nanogpt_runs_in_a_copy_and_with_the_threads_asked_for(runs, checkout):
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    outcome = runs.nanogpt(CPU, Plan(4))
    assert outcome.tokens_per_second == pytest.approx(76_800)
    assert (outcome.val_loss, outcome.train_loss) == (None, None)
    assert outcome.seconds > 0
    assert runs.nanogpt(CPU, Plan(500, 20)).val_loss == 2.5
    assert (runs.nanogpt_folder / "threads").read_text() == "3"
    assert {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()} == before


def test_without_threads_the_environment_stays(runs, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    runs.threads = None
    runs.nanogpt(CPU, Plan(4))
    assert (runs.nanogpt_folder / "threads").read_text() == "2"


def test_a_model_of_another_vocabulary_is_refused(runs):
    (runs.nanogpt_folder / "train.py").write_text(TRAIN.replace("found vocab_size = 18", "found vocab_size = 50304"))
    with pytest.raises(RunError, match="does not say that it found vocab_size = 18"):
        runs.nanogpt(CPU, Plan(4))


def test_a_nanogpt_that_fails_shows_its_last_lines(runs):
    code = "import sys\nprint('begun')\nprint('\\n'.join(map(str, range(20))), file=sys.stderr)\nsys.exit(3)\n"
    (runs.nanogpt_folder / "train.py").write_text(code)
    with pytest.raises(RunError) as failed:
        runs.nanogpt(CPU, Plan(4))
    lines = str(failed.value).splitlines()
    assert lines[0] == "nanoGPT failed with exit status 3; its last lines:"
    assert [line.strip() for line in lines[1:]] == [str(number) for number in range(12, 20)]


def test_a_gptfast_that_fails_shows_its_line(runs, monkeypatch):
    monkeypatch.setattr(recipe_runs, "gptfast_command", lambda *_: ["train", "nonsense"])
    with pytest.raises(RunError, match="gptfast failed with exit status 2; its last lines:\n    gptfast: unknown pres"):
        runs.gptfast(CPU, Plan(4))


def test_gptfasts_summary_comes_from_a_run_folder_of_its_own(runs, monkeypatch):
    folders = []

    def run(name, command, folder, threads):
        out = Path(command[command.index("--out") + 1])
        folders.append(out)
        out.mkdir()
        (out / "summary.json").write_text(json.dumps(SUMMARY))
        return "", 2.0

    monkeypatch.setattr(recipe_runs, "run_process", run)
    assert runs.gptfast(CPU, Plan(6)) == runs.gptfast(CPU, Plan(6)) == Outcome(30_000.0, None, None, 2.0)
    assert len(set(folders)) == 2
    assert not any(folder.exists() for folder in folders)
    monkeypatch.setattr(recipe_runs, "run_process", lambda *_: ("", 2.0))
    with pytest.raises(RunError, match=r"gptfast wrote no summary\.json"):
        runs.gptfast(CPU, Plan(6))


def test_the_settings_are_those_of_the_checkout(nanogpt):
    """Names that train.py has, and values of gptfast's preset in the recipe's file."""
    train, config = ((nanogpt / name).read_text(encoding="utf-8") for name in ("train.py", CONFIG))
    for recipe in RECIPES.values():
        for name in settings_of(recipe_runs.nanogpt_command(recipe, Plan(300, 20), "cpu")):
            assert f"\n{name} = " in train
    values: dict = {}
    exec(config, values)
    ours = RECIPES["char"].config
    for name in ("block_size", "n_layer", "n_head", "n_embd", "dropout"):
        assert getattr(ours.model, name) == values[name]
    pairs = {
        "batch_size": "batch_size",
        "learning_rate": "learning_rate",
        "min_learning_rate": "min_lr",
        "warmup_steps": "warmup_iters",
        "beta2": "beta2",
        "steps": "max_iters",
        "eval_interval": "eval_interval",
    }
    for name, theirs in pairs.items():
        assert getattr(ours, name) == values[theirs]
    for name in ("weight_decay", "beta1", "grad_clip"):  # train.py's own
        assert name not in values
        assert float(re.search(rf"^{name} = (\S+)", train, re.MULTILINE)[1]) == getattr(ours, name)
