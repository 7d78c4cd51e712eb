"""Training a GPT on text, from settings to a run folder."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gptfast import corpus, data, devices, flops, peaks, schedules, shards, tokenizers
from gptfast.backend import parse
from gptfast.config import GPTConfig
from gptfast.files import read_json
from gptfast.model import GPT
from gptfast.run import RunFolder
from gptfast.step import StepResult, TrainStep
from gptfast.tokenizers import Tokenizer

_DIVERGED = "lower --learning-rate or --grad-clip"


@dataclass
class TrainConfig:
    """Settings of a training run."""

    model: GPTConfig = field(default_factory=GPTConfig)
    data: str = "stdlib"
    """Training text: stdlib, shakespeare, a UTF-8 text file or a folder of them, or a folder that `gptfast prepare` or
    nanoGPT wrote."""
    tokenizer: str = "char"
    """char, byte, word, or the name of a tiktoken encoding such as gpt2."""
    vocabulary: str | None = None
    """Folder with the files of a tiktoken encoding, for machines without a network."""
    out: str | None = None
    """Run folder to write, which must be new; by default one below runs/."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: str = "auto"
    """Arithmetic of matrix products: float32, bfloat16, or auto (bfloat16 on GPUs that have it)."""
    backend: str = "auto"
    """auto, triton, eager, or choices by operator such as attention=triton,ffn=eager."""
    steps: int = 5000
    """Optimizer steps."""
    batch_size: int = 64
    """Sequences per step."""
    accumulation: int = 1
    """Parts, equal in size, in which a batch goes through the model, for less memory."""
    checkpoint_activations: bool = False
    """Compute each block's activations anew in the backward, for less memory."""
    compile: bool = False
    """Compile the model with torch.compile."""
    residual_dtype: str = "auto"
    """The residual stream's: float32, bfloat16, or auto, which is that of the weights. Half as wide is less memory."""
    learning_rate: float = 1e-3
    """Peak learning rate, reached after the warm-up."""
    schedule: str = "cosine"
    """What the learning rate does after the warm-up: cosine, constant, or wsd (stable, then a linear decay)."""
    min_learning_rate: float = 1e-4
    """Learning rate at the end of the cosine or the decay."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly."""
    decay_share: float = 0.2
    """Share of the steps after the warm-up, the last ones, in which wsd decays."""
    weight_decay: float = 0.1
    """AdamW's decay of matrices and embeddings."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.99
    """AdamW's decay of the mean squared gradient."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    held_out: float = 0.1
    """Share of the text, its end, that validation uses."""
    eval_interval: int = 250
    """Steps between evaluations."""
    eval_batches: int = 20
    """Batches of each split that an evaluation reads."""
    log_interval: int = 10
    """Steps between lines of the log."""
    seed: int = 1337
    """Seed of weights, batches and dropout."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "eval_interval", "eval_batches", "log_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        # far beyond any memory, and what NumPy says of sizes beyond its index names no setting
        if self.batch_size >= 2**31:
            raise ValueError(f"batch_size must be below 2**31, got {self.batch_size}")
        if self.batch_size % self.accumulation != 0:
            raise ValueError(
                f"batch_size must be a multiple of accumulation={self.accumulation}, got {self.batch_size}"
            )
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {self.seed}")
        if self.residual_dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"residual_dtype must be auto, float32 or bfloat16, got {self.residual_dtype!r}")
        for name in ("learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "grad_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.schedule not in schedules.NAMES:
            raise ValueError(f"schedule must be one of {', '.join(schedules.NAMES)}, got {self.schedule!r}")
        if not 0.0 <= self.decay_share <= 1.0:
            raise ValueError(f"decay_share must be in [0, 1], got {self.decay_share}")
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out}")


def train(config: TrainConfig, name: str = "run") -> dict[str, Any]:
    """Train as configured and write a run folder (see `gptfast.run`).

    Everything that can be wrong with the settings or the data is found before the folder is made, and a run that fails
    in its first step (out of memory, mostly) leaves none. An interrupt (Ctrl-C) ends training early and still evaluates
    and writes the outcome.

    Args:
        config: the settings; the vocabulary size comes from the tokenizer.
        name: of the folder below runs/ where `config.out` gives none.

    Returns:
        What `summary.json` holds: `val_loss` and `train_loss` of the saved weights in nats per token,
        `tokens_per_second`, `mfu` (a fraction, None where the device's peak is unknown), `params`, `steps`, `seconds`
        of the whole run, `device`, `backend` per operator, `interrupted`, and the folder as `run`.

    Raises:
        ValueError: a setting, the data or an override of the device's peak is wrong.
        RuntimeError: a loss is no longer a finite number.
    """
    device = devices.resolve(config.device)
    dtype = devices.resolve_dtype(config.dtype, device)
    asked = parse(config.backend)
    tokens, train_split, val_split = _load(config)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=tokens.vocab_size))
    peak = peaks.peak_flops(device, dtype)
    if peak is None:
        print(f"no peak for {str(dtype)[6:]}, so no MFU: {peaks.describe(device)}", flush=True)
    torch.manual_seed(config.seed)
    model = GPT(config.model, asked).to(device)
    if config.residual_dtype != "auto":
        model.set_residual_dtype(getattr(torch, config.residual_dtype))
    with RunFolder(Path(config.out) if config.out else _unused_folder(name)) as run:
        run.write_json("config.json", dataclasses.asdict(config))
        run.write_json("tokenizer.json", tokens.to_json())
        print(
            f"{model.get_num_params(non_embedding=False):,} parameters, {config.model.n_layer} layers of width "
            f"{config.model.n_embd}, context {config.model.block_size}; {len(train_split.tokens):,} training tokens, "
            f"vocabulary {tokens.vocab_size:,}; {device} in {str(dtype)[6:]}, writing {run.path}",
            flush=True,
        )
        summary = _Training(config, model, device, dtype, peak, train_split, val_split, run).run()
        run.write_json("summary.json", summary)
    return summary | {"run": str(run.path)}


def _load(config: TrainConfig) -> tuple[Tokenizer, data.Split, data.Split]:
    """The tokenizer, and the splits of training and validation."""
    folder, block_size = Path(config.data).expanduser(), config.model.block_size
    if not (folder.is_dir() and shards.is_prepared(folder)):
        text = corpus.load(config.data)
        tokens = tokenizers.for_documents(config.tokenizer, [text], vocabulary=config.vocabulary)
        ids = tokens.encode(text).astype(shards.DTYPES[shards.dtype_for(tokens.vocab_size)])
        return tokens, *data.split(ids, block_size, config.held_out)
    saved = folder / "tokenizer.json"
    if saved.is_file():
        tokens = tokenizers.from_json(read_json(saved))
    elif config.tokenizer in ("char", "word"):
        raise ValueError(
            f"{folder} has no tokenizer.json, and {config.tokenizer!r} cannot be told from its tokens; give "
            "--tokenizer gpt2 if these are GPT-2's, or prepare the text again"
        )
    else:
        tokens = tokenizers.for_documents(config.tokenizer, [], vocabulary=config.vocabulary)
    return tokens, *data.prepared(folder, block_size)


class _Training:
    """The loop of one run and what it measures."""

    def __init__(
        self,
        config: TrainConfig,
        model: GPT,
        device: torch.device,
        dtype: torch.dtype,
        peak: float | None,
        train_split: data.Split,
        val_split: data.Split,
        folder: RunFolder,
    ) -> None:
        self.config, self.model, self.device, self.dtype, self.folder = config, model, device, dtype, folder
        self.peak = peak
        self.train_split, self.val_split = train_split, val_split
        self.optimizer = model.configure_optimizers(
            config.weight_decay, config.learning_rate, (config.beta1, config.beta2), device.type
        )
        model.set_activation_checkpointing(config.checkpoint_activations)
        self.step = TrainStep(model, self.optimizer, config.accumulation, config.grad_clip, dtype, config.compile)
        self.best = {"val_loss": math.inf, "train_loss": math.inf}
        self.timed_tokens, self.timed_seconds = 0, 0.0

    def run(self) -> dict[str, Any]:
        started = time.perf_counter()
        steps, interrupted = 0, False
        with tqdm(total=self.config.steps, unit="step", dynamic_ncols=True, disable=None) as bar:
            try:
                for steps in self._steps(bar):
                    if steps % self.config.eval_interval == 0 and steps < self.config.steps:
                        self._evaluate(steps, bar)
            except KeyboardInterrupt:
                interrupted = True
            self._evaluate(steps, bar)
        speed = self.timed_tokens / self.timed_seconds if self.timed_seconds > 0 else None
        return {
            **self.best,
            "tokens_per_second": speed,
            "mfu": self._mfu(speed),
            "params": self.model.get_num_params(non_embedding=False),
            "steps": steps,
            "seconds": time.perf_counter() - started,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device),
            "backend": dict(self.model.backend),
            "interrupted": interrupted,
        }

    def _steps(self, bar: tqdm):
        """Yield the number of steps done after each. Time spent by the consumer does not count as training."""
        config, clock = self.config, time.perf_counter()
        tokens_per_step = config.batch_size * config.model.block_size
        untimed_steps = 0
        for step in range(config.steps):
            result = self._step(step)
            untimed_steps += 1
            done = step + 1
            # the first step sets things up and compiles kernels: it is not part of the speed
            if done == 1 or done % config.log_interval == 0 or done % config.eval_interval == 0 or done == config.steps:
                value, norm = result.loss, result.grad_norm  # waits for the device
                seconds = time.perf_counter() - clock
                speed = untimed_steps * tokens_per_step / seconds
                if done > 1:
                    self.timed_tokens += untimed_steps * tokens_per_step
                    self.timed_seconds += seconds
                self._report(done, value, norm, speed, bar)
                bar.update(untimed_steps)
                untimed_steps = 0
                yield done
                clock = time.perf_counter()
            else:
                yield done

    def _step(self, step: int) -> StepResult:
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(step)
        return self.step(*self.train_split.random_batch(self.config.batch_size, self.config.seed, step))

    def _learning_rate(self, step: int) -> float:
        c = self.config
        return schedules.learning_rate(
            c.schedule, step, c.steps, c.learning_rate, c.min_learning_rate, c.warmup_steps, c.decay_share
        )

    def _report(self, step: int, loss: float, norm: float, speed: float, bar: tqdm) -> None:
        for name, value in (("loss", loss), ("gradient's norm", norm)):
            if not math.isfinite(value):
                raise RuntimeError(f"the {name} is {value} at step {step}; {_DIVERGED}")
        mfu = self._mfu(speed)
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s, MFU {_percent(mfu)}")
        rate = self._learning_rate(step - 1)
        self.folder.append_log(
            {
                "step": step,
                "loss": loss,
                "grad_norm": norm,
                "learning_rate": rate,
                "tokens_per_second": speed,
                "mfu": mfu,
            }
        )

    def _evaluate(self, step: int, bar: tqdm) -> None:
        """Losses of both splits; the weights are saved when validation's is the lowest yet."""
        losses = {"val_loss": self._mean_loss(self.val_split), "train_loss": self._mean_loss(self.train_split)}
        for name, value in (("validation", losses["val_loss"]), ("train", losses["train_loss"])):
            if not math.isfinite(value):
                raise RuntimeError(f"the {name} loss is {value} after step {step}; {_DIVERGED}")
        self.folder.append_log({"step": step, **losses})
        bar.write(f"step {step}: train loss {losses['train_loss']:.4f}, validation loss {losses['val_loss']:.4f}")
        if losses["val_loss"] < self.best["val_loss"]:
            self.best = losses
            self.folder.save_weights(self.model)

    @torch.no_grad()
    def _mean_loss(self, split: data.Split) -> float:
        self.model.eval()
        total, sequences = 0.0, 0
        for idx, targets in split.even_batches(self.config.eval_batches, self.config.batch_size):
            with devices.autocast(self.device, self.dtype):
                _, loss = self.model(idx.to(self.device), targets.to(self.device))
            total += float(loss) * len(idx)
            sequences += len(idx)
        self.model.train()
        return total / sequences

    def _mfu(self, speed: float | None) -> float | None:
        if self.peak is None or speed is None:
            return None
        return flops.training_flops_per_token(self.config.model) * speed / self.peak


def describe(summary: dict[str, Any]) -> str:
    """The outcome of a run in a few lines for people."""
    speed = summary["tokens_per_second"]
    return (
        f"validation loss {summary['val_loss']:.4f}, train loss {summary['train_loss']:.4f} "
        f"after {summary['steps']} steps in {summary['seconds']:.0f} s\n"
        f"{'no' if speed is None else format(speed, ',.0f')} tokens/s, MFU {_percent(summary['mfu'])} "
        f"on {summary['device']}, backend {json.dumps(summary['backend'])}"
    )


def _percent(fraction: float | None) -> str:
    return "unknown" if fraction is None else f"{100 * fraction:.1f}%"


def _unused_folder(name: str) -> Path:
    path, number = Path("runs", name), 2
    while path.exists():
        path, number = Path("runs", f"{name}-{number}"), number + 1
    return path
