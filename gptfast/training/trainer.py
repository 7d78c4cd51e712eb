"""Training loop: from a config to a run folder."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptfast import devices, hardware, optim
from gptfast.data.batches import Prefetcher
from gptfast.training.config import TrainConfig
from gptfast.training.setup import Run, setup
from gptfast.training.signals import Interrupts
from gptfast.training.train_step import StepResult

_ADVICE = "lower --learning-rate or --grad-clip"
# float16's loss scale halves while gradients overflow; below this value scaling cannot be the cause
_MIN_LOSS_SCALE = 2.0**-6


def train(config: TrainConfig, name: str = "run", headline: str = "") -> dict[str, Any]:
    """Train a GPT and write a run folder (see `gptfast.checkpoint.run_folder`).

    Wrong settings and data raise before the folder is created, and a run that fails in its first step leaves none.
    SIGINT (Ctrl-C) and SIGTERM end training after the current step, with a checkpoint from which `config.resume`
    continues bit for bit. Under torchrun every process calls this function; rank 0 writes and prints.

    Args:
        config: the settings. The tokenizer determines the vocabulary size.
        name: name of the folder below runs/ if `config.out` is None.
        headline: line to print once all settings have been checked.

    Returns:
        The content of `summary.json`, and the folder as `run`. An interrupted run writes no `summary.json`.

        - `val_loss`, `train_loss`: losses of the saved weights in nats per token; None before the first evaluation
        - `val_perplexity`, and `val_bits_per_byte`, which is None with a lossy tokenizer
        - `validation_text`: "held out", or "training" if nothing is
        - `tokens_per_second`, and `mfu`, a fraction of the peak of all devices, None if that is unknown
        - `params`, `steps`, `device`, `processes`, `backend` by operator, `interrupted`
        - `seconds` of the whole run; `checkpoint_seconds` and `data_seconds`, the waits for checkpoints and batches

    Raises:
        ValueError: a setting, the data or an override of the device's peak is wrong.
        RuntimeError: a loss or gradient is not finite, or another process of the run has ended.
        OSError: the folder cannot be written.
    """
    with setup(config, name) as run:
        if run.world.is_main:
            announce(run, headline)
        started = time.perf_counter()
        batches = Prefetcher(functools.partial(load_batch, run), run.first, run.config.steps)
        with run.progress, contextlib.closing(run.saver), contextlib.closing(batches), Interrupts() as interrupts:
            steps = train_steps(run, batches, interrupts)
        summary = summarize(run, steps) | {
            "seconds": time.perf_counter() - started,
            "checkpoint_seconds": run.saver.seconds,
            "data_seconds": batches.waited,
        }
        run.saver.save_summary(summary)
        return summary | {"run": str(run.saver.path)}


def train_steps(run: Run, batches: Prefetcher, interrupts: Interrupts) -> int:
    """Train to the last step or to an interrupt; return the steps done, including those before a resume."""
    config = run.config
    pending: list[StepResult] = []  # the host has not waited for these steps
    waited = 0.0
    run.throughput.start()
    for step in range(run.first, config.steps):
        pending.append(take_step(run, step, *batches.next()))

        done, first, last = step + 1, step == run.first, step + 1 == config.steps
        stop = run.world.any(interrupts.requested)
        evaluates = last or (not stop and done % config.eval_interval == 0)
        saves = last or stop or (config.checkpoint_interval > 0 and done % config.checkpoint_interval == 0)
        logs = evaluates or done == 1 or done % config.log_interval == 0
        if first or logs or saves:
            require_finite(run, step, pending)
            speed = run.throughput.stop(len(pending), warmup=first)  # the first step compiles kernels
            if logs:
                log_step(run, step, pending[-1], speed, batches.waited - waited)
                waited = batches.waited
            run.progress.advance(done)
            if evaluates:
                evaluate(run, done)
            if saves:
                run.saver.save_checkpoint(done)
            pending.clear()
            run.throughput.start()
        if stop:
            break
    return done


def load_batch(run: Run, step: int) -> tuple[Tensor, Tensor]:
    """Load this rank's rows of a batch, [B, T] int64 each, into pinned memory if the model is on a GPU."""
    config, world = run.config, run.world
    batch = run.dataset.train.random_batch(config.batch_size, config.seed, step, world.rank, world.size)
    idx, targets = (part.contiguous() for part in batch)
    return (idx.pin_memory(), targets.pin_memory()) if run.state.step.device.type == "cuda" else (idx, targets)


def take_step(run: Run, step: int, idx: Tensor, targets: Tensor) -> StepResult:
    """Train on a batch, asynchronously on a GPU."""
    # dropout, like the batch, depends on seed, step and rank alone, so that it has no state to save
    seed = np.random.SeedSequence((run.config.seed, step, run.world.rank)).generate_state(1, np.uint64)
    devices.seed(run.state.step.device, int(seed[0]))
    for optimizer in run.state.step.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(run.config, step)
    with run.world.collective_errors():
        return run.state.step(idx, targets)


def _learning_rate(c: TrainConfig, step: int) -> float:
    return optim.learning_rate(
        c.schedule, step, c.steps, c.learning_rate, c.min_learning_rate, c.warmup_steps, c.decay_share
    )


def require_finite(run: Run, last: int, results: list[StepResult]) -> None:
    """Wait for the steps up to `last`; raise RuntimeError and save the batch of a step that is not finite."""
    for step, result in enumerate(results, last + 1 - len(results)):
        scaling = run.state.step.dtype == torch.float16 and result.loss_scale >= _MIN_LOSS_SCALE
        name, value = "loss", result.loss
        if math.isfinite(value) and not scaling:
            name, value = "gradient's norm", result.grad_norm
        if math.isfinite(value):
            continue
        config = run.config
        idx, targets = run.dataset.train.random_batch(config.batch_size, config.seed, step)
        measured = {"loss": str(result.loss), "grad_norm": str(result.grad_norm)}
        where = run.saver.save_failure(
            {"step": step + 1, "seed": config.seed, **measured}, {"idx": idx, "targets": targets}
        )
        raise RuntimeError(f"the {name} is {value} at step {step + 1}; {_ADVICE}{where}")


def log_step(run: Run, step: int, result: StepResult, speed: float, waited: float) -> None:
    """Log the measurements of a step."""
    entry = {
        "step": step + 1,
        "loss": result.loss,
        "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,  # float16's may overflow
        "learning_rate": _learning_rate(run.config, step),
        "tokens_per_second": speed,
        "mfu": run.throughput.mfu(speed),
        "memory_bytes": devices.peak_memory(run.state.step.device),
        "data_seconds": waited,
    }
    if run.state.step.dtype == torch.float16:
        entry["loss_scale"] = result.loss_scale
    run.progress.step(entry)


def evaluate(run: Run, done: int) -> None:
    """Measure, log and print the losses of both splits, and save the weights if they are the best so far."""
    # not the wrapper: DDP would synchronise
    metrics = run.evaluator.metrics(run.state.model)
    for name, value in (("validation", metrics["val_loss"]), ("train", metrics["train_loss"])):
        if not math.isfinite(value):
            raise RuntimeError(f"the {name} loss is {value} after step {done}; {_ADVICE}")
    run.progress.evaluation({"step": done, **metrics}, run.evaluator.sample(run.state.model))
    run.saver.save_if_best(metrics)


def announce(run: Run, headline: str) -> None:
    """Print the run's model, data, device and folder."""
    config, world, dataset, step = run.config, run.world, run.dataset, run.state.step
    shape, dtype = config.model, str(step.dtype).removeprefix("torch.")
    if headline:
        print(headline, flush=True)
    if run.throughput.roofline is None:
        print(f"no peak for {dtype}, so no MFU: {hardware.describe(step.device)}", flush=True)
    trained = sum(p.numel() for p in run.state.model.parameters() if p.requires_grad)
    total = run.state.model.get_num_params(non_embedding=False)
    part = f", {trained:,} of them trained" if trained < total else ""
    held_out = "" if dataset.has_held_out else "on which validation is too, "
    processes = "" if world.is_single else f" and {world.size} processes ({config.parallel})"
    where = f"continuing {run.saver.path} after step {run.first}" if run.first else f"writing {run.saver.path}"
    print(
        f"{total:,} parameters{part}, {shape.n_layer} layers of width {shape.n_embd}, context {shape.block_size}; "
        f"{len(dataset.train.tokens):,} training tokens, {held_out}vocabulary {shape.vocab_size:,}; "
        f"{step.device} in {dtype}{processes}, {where}",
        flush=True,
    )


def summarize(run: Run, steps: int) -> dict[str, Any]:
    """Collect the results of a run, see `train`."""
    device, speed = run.state.step.device, run.throughput.average
    return {
        **run.saver.best,
        "validation_text": "held out" if run.dataset.has_held_out else "training",
        "tokens_per_second": speed,
        "mfu": run.throughput.mfu(speed),
        "params": run.state.model.get_num_params(non_embedding=False),
        "steps": steps,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processes": run.world.size,
        "backend": dict(run.state.model.backend),
        "interrupted": steps < run.config.steps,
    }
