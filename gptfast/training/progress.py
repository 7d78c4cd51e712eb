"""Progress of a run: bar, log, TensorBoard and a plot of the losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from gptfast.checkpoint.run_folder import RunFolder, read_log


class Progress:
    """Shows and logs a run; a context manager.

    Args:
        folder: the run folder; None on ranks other than 0, which show and log nothing.
        steps: steps of the whole run.
        first: steps already done.
        tensorboard: also write TensorBoard files into the folder's `tensorboard`.
    """

    def __init__(self, folder: RunFolder | None, steps: int, first: int, tensorboard: bool) -> None:
        self._folder, self._steps, self._done, self._tensorboard = folder, steps, first, tensorboard

    def __enter__(self) -> Progress:
        self._bar = tqdm(
            total=self._steps,
            initial=self._done,
            unit="step",
            dynamic_ncols=True,
            disable=None if self._folder else True,  # None shows it on a terminal only
            smoothing=0.05,
        )
        self._board: Any = None
        if self._folder is not None and self._tensorboard:
            self._board = require_tensorboard()(str(self._folder.path / "tensorboard"), purge_step=self._done + 1)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._board is not None:
            self._board.close()

    def advance(self, done: int) -> None:
        """Move the bar to `done` steps."""
        self._bar.update(done - self._done)
        self._done = done

    def step(self, entry: dict[str, Any]) -> None:
        """Log the measurements of a step."""
        memory = entry["memory_bytes"]
        self._bar.set_postfix_str(
            f"loss {entry['loss']:.3f}, {entry['tokens_per_second']:,.0f} tokens/s, MFU {percent(entry['mfu'])}"
            + ("" if memory is None else f", {memory / 2**30:.1f} GiB")
        )
        self._log(entry)

    def evaluation(self, entry: dict[str, Any], sample: str | None) -> None:
        """Log and print an evaluation and a text sample."""
        if self._folder is None:
            return
        bits = entry["val_bits_per_byte"]
        self._bar.write(
            f"step {entry['step']}: train loss {entry['train_loss']:.4f}, validation loss {entry['val_loss']:.4f}"
            + ("" if bits is None else f", {bits:.4f} bits per byte")
        )
        if sample is not None:
            self._bar.write("\n".join(f"    {line}" for line in sample.splitlines()))
        self._log(entry if sample is None else {**entry, "sample": sample})

    def _log(self, entry: dict[str, Any]) -> None:
        if self._folder is None:
            return
        self._folder.append_log(entry)
        if self._board is not None:
            for name, value in entry.items():
                if name == "sample":
                    self._board.add_text(name, value, entry["step"])
                elif name != "step" and value is not None:
                    self._board.add_scalar(name, value, entry["step"])


def plot_losses(run: Path) -> None:
    """Plot the losses in the log of a run folder into its loss.png."""
    from matplotlib.figure import Figure  # takes a second to import
    from matplotlib.ticker import MaxNLocator

    entries = read_log(run)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, label, color, marker in (
        ("loss", "training, single batches", "#b8c4d6", None),
        ("train_loss", "training", "#2f6db3", "."),
        ("val_loss", "validation", "#d1603d", "."),
    ):
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        if points:
            few = marker if len(points) < 50 else None
            axes.plot(*zip(*points, strict=True), label=label, color=color, marker=few)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.set_title(run.name, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    partial = run / "loss.png.partial"
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(run / "loss.png")


def percent(fraction: float | None) -> str:
    """Format a fraction as a percentage; None is "unknown"."""
    return "unknown" if fraction is None else f"{100 * fraction:.1f}%"


def require_tensorboard() -> Any:
    """Import TensorBoard's `SummaryWriter`; raise ValueError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"--tensorboard needs the package tensorboard ({error}); pip install tensorboard") from error
    return SummaryWriter
