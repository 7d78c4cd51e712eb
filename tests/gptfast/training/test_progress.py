"""What people and their programs see of a run."""

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
    "step": 1,
    "loss": 3.25,
    "grad_norm": 0.5,
    "learning_rate": 1e-3,
    "tokens_per_second": 12345.6,
    "mfu": 0.125,
    "memory_bytes": 3 * 2**29,
    "data_seconds": 0.0,
}
EVALUATION = {"step": 2, "val_loss": 2.5, "train_loss": 2.25, "val_perplexity": 12.18, "val_bits_per_byte": 3.607}
UNKNOWN = {"mfu": None, "memory_bytes": None, "grad_norm": None}


@pytest.fixture
def folder(tmp_path):
    with RunFolder(tmp_path / "some run") as made:
        yield made


def logged(folder: RunFolder, *entries: dict, first: int = 0, tensorboard: bool = False, sample: str | None = None):
    with Progress(folder, 20, first, tensorboard) as shown:
        for entry in entries:
            shown.advance(entry["step"])
            if "val_loss" in entry:
                shown.evaluation(entry, sample)
            else:
                shown.step(entry)


def test_the_log_holds_what_was_measured(folder):
    logged(folder, STEP, EVALUATION, {**STEP, **UNKNOWN, "loss_scale": 2.0**16}, sample="two\nlines")
    assert read_log(folder.path) == [
        STEP,
        {**EVALUATION, "sample": "two\nlines"},
        {**STEP, **UNKNOWN, "loss_scale": 2.0**16},
    ]
    assert len((folder.path / "log.jsonl").read_text().splitlines()) == 3
    assert sorted(path.name for path in folder.path.iterdir()) == [".lock", "log.jsonl"]


def test_an_evaluation_is_printed(folder, capsys):
    logged(folder, EVALUATION, sample="To be,\nor")
    logged(folder, {**EVALUATION, "val_bits_per_byte": None})
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


def test_a_terminal_shows_a_bar(folder, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "150")
    with Progress(folder, 20, 4, False) as shown:
        shown.advance(6)
        shown.step({**STEP, "step": 6})
        assert "| 6/20 [" in terminal.getvalue()
        assert "loss 3.250, 12,346 tokens/s, MFU 12.5%, 1.5 GiB]" in terminal.getvalue()
        shown.advance(7)
        shown.step({**STEP, **UNKNOWN, "step": 7})
    assert "loss 3.250, 12,346 tokens/s, MFU unknown]" in terminal.getvalue()
    assert "| 7/20 [" in terminal.getvalue()


def test_a_file_that_takes_the_output_gets_no_bar(folder, capsys):
    logged(folder, STEP)
    assert capsys.readouterr() == ("", "")


def test_processes_other_than_the_first_write_and_print_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    logged(None, STEP, EVALUATION, tensorboard=True, sample="text")
    assert capsys.readouterr().out == terminal.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_told_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ValueError, match=r"^--tensorboard needs the package tensorboard \(.*\); pip install") as raised:
        progress.require_tensorboard()
    assert "\n" not in str(raised.value)


def scalars(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard finds: steps and values by name."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def samples(folder: RunFolder) -> list[tuple[int, str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    found = events.Tensors("sample/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in found]


def test_tensorboard_gets_the_numbers_of_the_log(folder):
    pytest.importorskip("tensorboard")
    second = {**STEP, **UNKNOWN, "step": 2, "loss": 2.75, "loss_scale": 2.0**16}
    logged(folder, STEP, second, EVALUATION, {**EVALUATION, "step": 4}, tensorboard=True, sample="To be\n")
    expected: dict[str, list[tuple[int, float]]] = {}
    for entry in read_log(folder.path):
        for name, value in entry.items():
            if name not in ("step", "sample") and value is not None:
                expected.setdefault(name, []).append((entry["step"], pytest.approx(value)))
    assert scalars(folder) == expected
    assert expected["loss"] == [(1, 3.25), (2, 2.75)]
    assert expected["loss_scale"] == [(2, 2.0**16)]
    assert expected["mfu"] == [(1, 0.125)]
    assert samples(folder) == [(2, "To be\n"), (4, "To be\n")]


def test_tensorboard_forgets_steps_that_are_taken_again(folder):
    pytest.importorskip("tensorboard")
    logged(folder, *({**STEP, "step": step, "loss": 3.0} for step in (1, 5, 8, 10)), tensorboard=True)
    folder.truncate_log(8)
    logged(folder, *({**STEP, "step": step, "loss": 2.0} for step in (9, 10)), first=8, tensorboard=True)
    assert scalars(folder)["loss"] == [(1, 3.0), (5, 3.0), (8, 3.0), (9, 2.0), (10, 2.0)]
    assert [(entry["step"], entry["loss"]) for entry in read_log(folder.path)] == scalars(folder)["loss"]


def test_without_being_asked_tensorboard_gets_nothing(folder):
    logged(folder, STEP, EVALUATION)
    assert not (folder.path / "tensorboard").exists()


CURVES = {"loss": "#b8c4d6", "train_loss": "#2f6db3", "val_loss": "#d1603d"}


def colors(image: np.ndarray) -> set[str]:
    """Those of whole pixels."""
    pixels = (image[..., :3] * 255).round().astype(np.uint8).reshape(-1, 3)
    return {"#" + bytes(color).hex() for color in np.unique(pixels, axis=0)}


def drawn(folder: RunFolder) -> np.ndarray:
    """The plot: [rows, columns, 3 or 4], from 0 to 1."""
    progress.plot_losses(folder.path)
    assert not (folder.path / "loss.png.partial").exists()
    return matplotlib.image.imread(folder.path / "loss.png", format="png")


def write_curves(folder: RunFolder, steps: int) -> None:
    random = np.random.default_rng(0)
    for step in range(10, steps + 1, 10):
        loss = 1.5 + 2.5 * math.exp(-step / 150)
        folder.append_log({**STEP, "step": step, "loss": loss + 0.05 * random.standard_normal()})
        if step % 50 == 0:
            folder.append_log({**EVALUATION, "step": step, "train_loss": loss, "val_loss": loss + 0.1 + step / 5000})


def test_the_plot_has_three_curves(folder):
    write_curves(folder, 500)
    image = drawn(folder)
    assert image.shape[:2] == (480, 840)
    assert image.std() > 0.03
    assert set(CURVES.values()) <= colors(image)


def test_a_run_that_ended_before_its_first_evaluation(folder):
    folder.append_log({**STEP, **UNKNOWN, "loss_scale": 2.0**16})
    folder.append_log({**STEP, "step": 2})
    found = colors(drawn(folder))
    assert {name for name, color in CURVES.items() if color in found} == {"loss"}


def test_a_single_evaluation_is_a_point(folder):
    folder.append_log(EVALUATION)
    found = colors(drawn(folder))
    assert {name for name, color in CURVES.items() if color in found} == {"train_loss", "val_loss"}


def test_a_folder_whose_name_is_no_formula(tmp_path):
    with RunFolder(tmp_path / "a $_$ run") as made:
        write_curves(made, 100)
        assert drawn(made).shape[:2] == (480, 840)


def test_a_plot_takes_the_place_of_the_older_one(folder):
    write_curves(folder, 100)
    first = drawn(folder)
    write_curves(folder, 500)
    assert not np.array_equal(drawn(folder), first)


def test_an_unfinished_last_line_is_no_part_of_the_plot(folder):
    write_curves(folder, 100)
    with open(folder.path / "log.jsonl", "a") as log:
        log.write(json.dumps(STEP)[:20])
    assert drawn(folder).shape[:2] == (480, 840)


@pytest.mark.parametrize(("fraction", "text"), [(None, "unknown"), (0.0, "0.0%"), (0.4567, "45.7%"), (1, "100.0%")])
def test_percent(fraction, text: str):
    assert progress.percent(fraction) == text
