"""Training a GPT on text, from settings to a run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptfast import devices, flops, hardware, optim
from gptfast.backend import parse
from gptfast.checkpoint.manager import Checkpoint, Checkpoints
from gptfast.checkpoint.run_folder import RunFolder
from gptfast.data import batches
from gptfast.distributed import World
from gptfast.evaluation import metrics
from gptfast.generation.detokenizer import TextStream
from gptfast.training import progress
from gptfast.training.config import TrainConfig
from gptfast.training.progress import Progress
from gptfast.training.setup import Start
from gptfast.training.signals import Interrupts
from gptfast.training.train_state import TrainState
from gptfast.training.train_step import StepResult, TrainStep
from gptfast.training.validation import Sequences

_DIVERGED = "lower --learning-rate or --grad-clip"
# float16's scale finds its level by overflowing; below this it never will
_LEAST_SCALE = 2.0**-6


def train(config: TrainConfig, name: str = "run", headline: str = "") -> dict[str, Any]:
    """Train as configured and write a run folder (see `gptfast.checkpoint.run_folder`).

    Everything that can be wrong with the settings or the data is found before the folder is made, and a run that fails
    in its first step (out of memory, mostly) leaves none. An interrupt (Ctrl-C, or SIGTERM) ends training after the
    step, with a checkpoint from which `config.resume` goes on as if nothing had been. Started by torchrun, all
    processes call this, and the first one writes and prints.

    Args:
        config: the settings; the vocabulary size comes from the tokenizer.
        name: of the folder below runs/ where `config.out` gives none.
        headline: to print when all settings are found right.

    Returns:
        What `summary.json` holds: `val_loss` and `train_loss` of the saved weights in nats per token (None where an
        interrupt came before the first evaluation), `val_perplexity`, `val_bits_per_byte` (None where the tokenizer
        does not keep the text), `validation_text` ("held out", or "training" where nothing is), `tokens_per_second`,
        `mfu` (a fraction of all devices' peak, None where that is unknown), `params`, `steps`, `seconds` of the whole
        run, `checkpoint_seconds` that it waited for checkpoints, `data_seconds` that it waited for batches, `device`,
        `processes`, `backend` per operator, `interrupted`, and the folder as `run`. An interrupted run has no
        `summary.json` yet.

    Raises:
        ValueError: a setting, the data or an override of the device's peak is wrong.
        RuntimeError: a loss is no longer a finite number, or another process of the run has ended.
        OSError: the folder cannot be written.
    """
    world = World.from_environment()
    device = world.device(devices.resolve(config.device))
    dtype = devices.resolve_dtype(config.dtype, device)
    if config.batch_size % (world.size * config.accumulation) != 0:
        raise ValueError(
            f"batch_size must be a multiple of {world.size} processes times accumulation={config.accumulation}, got "
            f"{config.batch_size}"
        )
    devices.keep_freed_memory()
    if world.restarts > 0:
        config = dataclasses.replace(config, resume=True)
    if config.tensorboard:
        progress.require_tensorboard()
    start = Start(config, device, parse(config.backend))
    peak = hardware.peak_flops(device, dtype)
    folder: RunFolder | None = None

    def open_folder() -> str:
        nonlocal folder
        folder = RunFolder(Path(config.out) if config.out else _unused_folder(name), config.resume)
        return str(folder.path)

    with world:
        world.connect(device)
        path = Path(world.run_on_main(open_folder))
        with contextlib.nullcontext() if folder is None else folder:
            training = _Training(start, world, device, dtype, peak, path, folder)
            training.begin(headline)
            return training.run()


class _Training:
    """The loop of one run and what it measures. Only the first process has the folder to write to."""

    def __init__(
        self,
        start: Start,
        world: World,
        device: torch.device,
        dtype: torch.dtype,
        peak: float | None,
        path: Path,
        folder: RunFolder | None,
    ) -> None:
        self.config, self.model, self.tokenizer = start.config, start.model, start.tokenizer
        self.world, self.device, self.dtype, self.path, self.folder = world, device, dtype, path, folder
        self.peak = None if peak is None else peak * world.size
        self.train_split = start.train_split
        self.validation_text = "training" if start.val_split is start.train_split else "held out"
        config = self.config
        self.sequences = {
            name: Sequences(split, config.eval_batches, config.batch_size)
            for name, split in (("val_loss", start.val_split), ("train_loss", start.train_split))
        }
        self.bytes_per_token = self.sequences["val_loss"].bytes_per_token(self.tokenizer)
        self.data = {"train": start.train_split.fingerprint(), "val": start.val_split.fingerprint()}
        self.checkpoints = Checkpoints(path / "checkpoints", config.keep_checkpoints)
        saved, damaged = self.checkpoints.latest() if config.resume else (None, [])
        self.first = 0 if saved is None else saved.step
        self._require_steps()
        self.best: dict[str, Any] = {"val_loss": None, "train_loss": None}
        self.trained = self._build(saved)
        if saved is not None:
            self._require_same_data(saved)
            self.best = saved.state["best"]
        self.damaged = damaged
        self.timed_sequences, self.timed_seconds, self.checkpoint_seconds = 0, 0.0, 0.0

    def _require_steps(self) -> None:
        """Raise ValueError unless there are steps to take, in all processes the same."""
        if int(self.world.sum(torch.tensor(self.first))) != self.first * self.world.size:
            raise ValueError(
                f"processes see different checkpoints in {self.path}, a folder that all of them must share"
            )
        if self.first >= self.config.steps:
            raise ValueError(
                f"the run in {self.path} has done {self.first} steps; to go on give more than that as --steps"
            )

    def _build(self, saved: Checkpoint | None) -> TrainState:
        """The step, with the weights and the optimizers' state of a checkpoint."""
        config, model = self.config, self.model
        if saved is not None:
            TrainState.load_weights(model, saved)
        wrapped = self.world.wrap(model, model.transformer.h, config.parallel, config.compile)
        betas = (config.beta1, config.beta2)
        built = optim.build(
            config.optimizer, model.named_parameters(), config.weight_decay, config.learning_rate, betas,
            self.device.type,
        )  # fmt: skip
        compiled = config.compile and self.world.is_single
        self.step = TrainStep(wrapped, built, config.accumulation, config.grad_clip, self.dtype, compiled)
        trained = TrainState(model, self.step)
        if saved is not None:
            trained.load_optimizers(saved)
        return trained

    def _require_same_data(self, saved: Checkpoint) -> None:
        for split, found in self.data.items():
            if saved.state["data"][split] != found:
                raise ValueError(
                    f"{self.config.data} is not what the run in {self.path} was trained on: {split} was "
                    f"{saved.state['data'][split]}, and is {found}"
                )

    def begin(self, headline: str) -> None:
        """Write what a run begins with, and say it."""
        config, model = self.config, self.config.model
        if self.folder is None:
            return
        for what in self.damaged:
            _say(f"continuing from an older checkpoint: {what}")
        self.checkpoints.clean()
        self.folder.forget_log_after(self.first)
        self.folder.write_json("config.json", dataclasses.asdict(config))
        self.folder.write_json("tokenizer.json", self.tokenizer.to_json())
        if headline:
            _say(headline)
        if self.peak is None:
            _say(f"no peak for {str(self.dtype)[6:]}, so no MFU: {hardware.describe(self.device)}")
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        total = self.model.get_num_params(non_embedding=False)
        part = f", {trained:,} of them trained" if trained < total else ""
        processes = "" if self.world.is_single else f" and {self.world.size} processes ({config.parallel})"
        held_out = "" if self.validation_text == "held out" else "on which validation is too, "
        where = f"continuing {self.path} after step {self.first}" if self.first else f"writing {self.path}"
        _say(
            f"{total:,} parameters{part}, {model.n_layer} layers of width {model.n_embd}, context {model.block_size}; "
            f"{len(self.train_split.tokens):,} training tokens, {held_out}"
            f"vocabulary {model.vocab_size:,}; {self.device} in {str(self.dtype)[6:]}{processes}, {where}"
        )

    def run(self) -> dict[str, Any]:
        started = time.perf_counter()
        config = self.config
        self.batches = batches.Prefetcher(self._batch, self.first, config.steps)
        self.progress = Progress(self.folder, config.steps, self.first, config.tensorboard)
        try:
            with Interrupts() as interrupts:
                done = self._steps(interrupts)
        finally:
            self.batches.close()
            try:
                self.checkpoints.close()
            finally:
                self.progress.close()
        timed = self.timed_sequences, config.model.block_size, self.timed_seconds
        speed = flops.tokens_per_second(*timed) if self.timed_seconds > 0 else None
        summary = {
            **self.best,
            "validation_text": self.validation_text,
            "tokens_per_second": speed,
            "mfu": self._mfu(speed),
            "params": self.model.get_num_params(non_embedding=False),
            "steps": done,
            "seconds": time.perf_counter() - started,
            "checkpoint_seconds": self.checkpoint_seconds,
            "data_seconds": self.batches.waited,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device),
            "processes": self.world.size,
            "backend": dict(self.model.backend),
            "interrupted": done < config.steps,
        }
        if self.folder is not None:
            self.progress.plot()
            if not summary["interrupted"]:
                self.folder.write_json("summary.json", summary)
        return summary | {"run": str(self.path)}

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This process's rows of a step's batch."""
        config, world = self.config, self.world
        batch = self.train_split.random_batch(config.batch_size, config.seed, step, world.rank, world.size)
        idx, targets = (part.contiguous() for part in batch)
        return (idx.pin_memory(), targets.pin_memory()) if self.device.type == "cuda" else (idx, targets)

    def _steps(self, interrupts: Interrupts) -> int:
        """Take the steps; how many were done, all runs of this folder together."""
        config = self.config
        untimed: list[tuple[int, StepResult]] = []
        clock, waited = time.perf_counter(), 0.0
        for step in range(self.first, config.steps):
            untimed.append((step, self._step(step)))
            done = step + 1
            # the first step sets things up and compiles kernels: it is not part of the speed
            warm, last = step > self.first, done == config.steps
            stop = self.world.any(interrupts.asked)
            evaluates = last or (done % config.eval_interval == 0 and not stop)
            saves = stop or last or (config.checkpoint_interval > 0 and done % config.checkpoint_interval == 0)
            if done == 1 or not warm or saves or evaluates or done % config.log_interval == 0:
                for number, result in untimed:  # waits for the device
                    self._require_finite(number, result)
                seconds = time.perf_counter() - clock
                if warm:
                    self.timed_sequences += len(untimed) * config.batch_size
                    self.timed_seconds += seconds
                speed = flops.tokens_per_second(len(untimed) * config.batch_size, config.model.block_size, seconds)
                if done == 1 or evaluates or done % config.log_interval == 0:
                    self._report(done, untimed[-1][1], speed, self.batches.waited - waited)
                    waited = self.batches.waited
                self.progress.advance(done)
                untimed = []
                if evaluates:
                    self._evaluate(done)
                if saves:
                    self._checkpoint(done)
                clock = time.perf_counter()
            if stop:
                return done
        return config.steps

    def _step(self, step: int) -> StepResult:
        # dropout is a function of seed, step and process, as batches are: there is no state to lose
        drawn = np.random.SeedSequence((self.config.seed, step, self.world.rank)).generate_state(1, np.uint64)
        devices.seed(self.device, int(drawn[0]))
        for optimizer in self.step.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._learning_rate(step)
        with self.world.collective_errors():
            return self.step(*self.batches.next())

    def _learning_rate(self, step: int) -> float:
        c = self.config
        return optim.learning_rate(
            c.schedule, step, c.steps, c.learning_rate, c.min_learning_rate, c.warmup_steps, c.decay_share
        )

    def _require_finite(self, step: int, result: StepResult) -> None:
        """Raise RuntimeError for a step whose loss or gradient is no number, and keep its batch."""
        overflowed = self.dtype == torch.float16 and result.loss_scale >= _LEAST_SCALE
        for name, value in (("loss", result.loss), ("gradient's norm", result.grad_norm)):
            if math.isfinite(value) or (overflowed and name != "loss"):
                continue
            where = ""
            if self.folder is not None:
                idx, targets = self.train_split.random_batch(self.config.batch_size, self.config.seed, step)
                self.folder.write_tensors("failed-batch.safetensors", {"idx": idx, "targets": targets})
                values = {"loss": str(result.loss), "grad_norm": str(result.grad_norm)}
                self.folder.write_json("failed-step.json", {"step": step + 1, "seed": self.config.seed, **values})
                where = f"; its batch is in {self.path / 'failed-batch.safetensors'}"
            raise RuntimeError(f"the {name} is {value} at step {step + 1}; {_DIVERGED}{where}")

    def _report(self, step: int, result: StepResult, speed: float, waited: float) -> None:
        scale = {"loss_scale": result.loss_scale} if self.dtype == torch.float16 else {}
        # float16's gradients may overflow, and JSON has no infinity
        norm = result.grad_norm if math.isfinite(result.grad_norm) else None
        self.progress.step(
            {
                "step": step,
                "loss": result.loss,
                "grad_norm": norm,
                "learning_rate": self._learning_rate(step - 1),
                "tokens_per_second": speed,
                "mfu": self._mfu(speed),
                "memory_bytes": devices.peak_memory(self.device),
                "data_seconds": waited,
                **scale,
            }
        )

    def _evaluate(self, step: int) -> None:
        """Losses of both splits; the weights are saved when validation's is the lowest yet."""
        losses = {"val_loss": self._mean_loss(self.sequences["val_loss"])}
        same = self.validation_text == "training"
        losses["train_loss"] = losses["val_loss"] if same else self._mean_loss(self.sequences["train_loss"])
        for name, value in (("validation", losses["val_loss"]), ("train", losses["train_loss"])):
            if not math.isfinite(value):
                raise RuntimeError(f"the {name} loss is {value} after step {step}; {_DIVERGED}")
        val_loss, perplexity = losses["val_loss"], metrics.perplexity(losses["val_loss"])
        ratio = self.bytes_per_token
        entry = {
            **losses,
            "val_perplexity": perplexity if math.isfinite(perplexity) else None,
            "val_bits_per_byte": None if ratio is None else metrics.bits_per_byte(val_loss, ratio),
        }
        self.progress.evaluation({"step": step, **entry}, self._sample() if self.config.sample_tokens else None)
        if self.best["val_loss"] is None or val_loss < self.best["val_loss"]:
            self.best = entry
            self._save_weights()

    def _save_weights(self) -> None:
        if not self._takes_part_in_saving:
            return
        started = time.perf_counter()
        files = self.trained.files()
        if self.folder is not None:
            for name, tensors in files.items():
                self.checkpoints.write(functools.partial(self.folder.write_tensors, name, tensors))
        self.checkpoint_seconds += time.perf_counter() - started

    def _mean_loss(self, sequences: Sequences) -> float:
        # not what is compiled, or reduces gradients: but parts of parameters are gathered by the model itself
        return sequences.mean_loss(self.model, self.dtype, self.world)

    def _sample(self) -> str:
        """A continuation of the prompt, the same draws each time."""
        tokenizer, prompt = self.tokenizer, self.config.sample_prompt
        if prompt:
            idx = tokenizer.encode(prompt)
        elif tokenizer.end_of_text is not None:
            idx = np.array([tokenizer.end_of_text])
        else:
            idx = self._line_end()
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        start = torch.from_numpy(idx.astype(np.int64))[None].to(self.device)
        with devices.autocast(self.device, self.dtype):
            tokens = self.model.generate(start, self.config.sample_tokens, 0.8, None, generator)
        stream = TextStream(tokenizer, after=int(idx[-1]) if prompt else None)  # words have a space between them
        pieces = [stream.push(token) for token in tokens[0, len(idx) :].tolist()]
        return prompt + "".join(pieces) + stream.flush()

    def _line_end(self) -> np.ndarray:
        try:
            return self.tokenizer.encode("\n")
        except ValueError:  # a text without lines
            return self.train_split.tokens.windows(np.zeros(1, dtype=np.int64), 1)[0]

    @property
    def _takes_part_in_saving(self) -> bool:
        return self.folder is not None or self.trained.in_parts

    def _checkpoint(self, step: int) -> None:
        if not self._takes_part_in_saving:
            return
        started = time.perf_counter()
        checkpoint = self.trained.checkpoint(step, {"best": self.best, "data": self.data})
        if self.folder is not None:
            self.checkpoints.save(checkpoint)
        self.checkpoint_seconds += time.perf_counter() - started

    def _mfu(self, speed: float | None) -> float | None:
        if speed is None:
            return None
        return flops.utilisation(speed, flops.most_tokens_per_second(self.config.model, self.peak))


def _say(text: str) -> None:
    print(text, flush=True)


def _unused_folder(name: str) -> Path:
    path, number = Path("runs", name), 2
    while path.exists():
        path, number = Path("runs", f"{name}-{number}"), number + 1
    return path
