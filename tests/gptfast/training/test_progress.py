"""Tests of the terminal output and the log of a run."""

from __future__ import annotations

import io
import json
import math
import sys

import matplotlib.image
import numpy as np
import pytest

from gptfast.checkpoint.run_folder import RunFolder, read_log
from gptfast.training import progress
from gptfast.training.progress import Progress

STEP = {
    "step": 1, "loss": 3.25, "grad_norm": 0.5, "learning_rate": 1e-3, "tokens_per_second": 12345.6, "mfu": 0.125,
    "memory_bytes": 3 * 2**29, "data_seconds": 0.0,
}  # fmt: skip
EVALUATION = {"step": 2, "val_loss": 2.5, "train_loss": 2.25, "val_perplexity": 12.18, "val_bits_per_byte": 3.607}
UNKNOWN = {"mfu": None, "memory_bytes": None, "grad_norm": None}


@pytest.fixture
def folder(tmp_path):
    with RunFolder(tmp_path / "some run") as made:
        yield made


def log(folder: RunFolder | None, *entries: dict, first: int = 0, tensorboard: bool = False, sample: str | None = None):
    with Progress(folder, 20, first, tensorboard) as shown:
        for entry in entries:
            shown.advance(entry["step"])
            shown.evaluation(entry, sample) if "val_loss" in entry else shown.step(entry)


def test_log_holds_the_measurements(folder):
    scaled = {**STEP, **UNKNOWN, "loss_scale": 2.0**16}
    log(folder, STEP, EVALUATION, scaled, sample="two\nlines")
    assert read_log(folder.path) == [STEP, {**EVALUATION, "sample": "two\nlines"}, scaled]
    assert len((folder.path / "log.jsonl").read_text().splitlines()) == 3
    assert sorted(path.name for path in folder.path.iterdir()) == [".lock", "log.jsonl"]  # no TensorBoard files


def test_evaluation_is_printed(folder, capsys):
    log(folder, EVALUATION, sample="To be,\nor")
    log(folder, {**EVALUATION, "val_bits_per_byte": None})
    assert capsys.readouterr().out == (
        "step 2: train loss 2.2500, validation loss 2.5000, 3.6070 bits per byte\n"
        "    To be,\n"
        "    or\n"
        "step 2: train loss 2.2500, validation loss 2.5000\n"
    )
    assert ["sample" in entry for entry in read_log(folder.path)] == [True, False]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_is_shown_on_a_terminal(folder, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "150")
    log(folder, {**STEP, "step": 6}, {**STEP, **UNKNOWN, "step": 7}, first=4)
    text = terminal.getvalue()
    assert "| 6/20 [" in text
    assert "| 7/20 [" in text
    assert "loss 3.250, 12,346 tokens/s, MFU 12.5%, 1.5 GiB]" in text
    assert "loss 3.250, 12,346 tokens/s, MFU unknown]" in text


def test_bar_is_not_shown_in_a_file(folder, capsys):
    log(folder, STEP)
    assert capsys.readouterr() == ("", "")


def test_other_ranks_write_and_print_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    log(None, STEP, EVALUATION, tensorboard=True, sample="text")
    assert capsys.readouterr().out == terminal.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


def test_missing_tensorboard_is_an_error_of_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ValueError, match=r"^--tensorboard .*pip install tensorboard$"):
        progress.require_tensorboard()


def tensorboard_events(folder: RunFolder) -> tuple[dict[str, list[tuple[int, float]]], list[tuple[int, str]]]:
    """Scalars by name, and samples, each with their steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    scalars = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    samples = events.Tensors("sample/text_summary") if "sample/text_summary" in events.Tags()["tensors"] else []
    return scalars, [(event.step, event.tensor_proto.string_val[0].decode()) for event in samples]


def test_tensorboard_gets_the_log(folder):
    pytest.importorskip("tensorboard")
    second = {**STEP, **UNKNOWN, "step": 2, "loss": 2.75, "loss_scale": 2.0**16}
    log(folder, STEP, second, EVALUATION, {**EVALUATION, "step": 4}, tensorboard=True, sample="To be\n")
    expected: dict[str, list[tuple[int, float]]] = {}
    for entry in read_log(folder.path):
        for name, value in entry.items():
            if name not in ("step", "sample") and value is not None:
                expected.setdefault(name, []).append((entry["step"], pytest.approx(value)))
    assert expected["loss"] == [(1, 3.25), (2, 2.75)]
    assert tensorboard_events(folder) == (expected, [(2, "To be\n"), (4, "To be\n")])


def test_tensorboard_drops_steps_that_are_repeated(folder):
    pytest.importorskip("tensorboard")
    log(folder, *({**STEP, "step": step, "loss": 3.0} for step in (1, 5, 8, 10)), tensorboard=True)
    folder.truncate_log(8)
    log(folder, *({**STEP, "step": step, "loss": 2.0} for step in (9, 10)), first=8, tensorboard=True)
    losses = tensorboard_events(folder)[0]["loss"]
    assert losses == [(1, 3.0), (5, 3.0), (8, 3.0), (9, 2.0), (10, 2.0)]
    assert [(entry["step"], entry["loss"]) for entry in read_log(folder.path)] == losses


CURVES = {"loss": "#b8c4d6", "train_loss": "#2f6db3", "val_loss": "#d1603d"}


def plot(folder: RunFolder) -> tuple[np.ndarray, set[str]]:
    """The picture [rows, columns, 3 or 4], from 0 to 1, and the curves whose colour it shows."""
    progress.plot_losses(folder.path)
    assert not (folder.path / "loss.png.partial").exists()
    image = matplotlib.image.imread(folder.path / "loss.png", format="png")
    assert image.shape[:2] == (480, 840)
    pixels = (image[..., :3] * 255).round().astype(np.uint8).reshape(-1, 3)
    colors = {"#" + bytes(color).hex() for color in np.unique(pixels, axis=0)}
    return image, {name for name, color in CURVES.items() if color in colors}


def write_curves(folder: RunFolder, steps: int) -> None:
    random = np.random.default_rng(0)
    for step in range(10, steps + 1, 10):
        loss = 1.5 + 2.5 * math.exp(-step / 150)
        folder.append_log({**STEP, "step": step, "loss": loss + 0.05 * random.standard_normal()})
        if step % 50 == 0:
            folder.append_log({**EVALUATION, "step": step, "train_loss": loss, "val_loss": loss + 0.1 + step / 5000})


def test_plot_shows_three_curves_and_replaces_an_older_plot(folder):
    write_curves(folder, 100)
    with open(folder.path / "log.jsonl", "a") as file:
        file.write(json.dumps(STEP)[:20])  # a killed process leaves half a line
    before, _ = plot(folder)
    write_curves(folder, 500)
    image, curves = plot(folder)
    assert curves == set(CURVES)
    assert image.std() > 0.03
    assert not np.array_equal(image, before)


@pytest.mark.parametrize(
    ("entries", "curves"),
    [([STEP, {**STEP, **UNKNOWN, "step": 2}], {"loss"}), ([EVALUATION], {"train_loss", "val_loss"})],
)
def test_plot_shows_the_curves_of_the_log(folder, entries, curves):
    for entry in entries:
        folder.append_log(entry)
    assert plot(folder)[1] == curves


def test_plot_takes_any_folder_name(tmp_path):
    with RunFolder(tmp_path / "a $_$ run") as made:  # no formula
        write_curves(made, 100)
        plot(made)
