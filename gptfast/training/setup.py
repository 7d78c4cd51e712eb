"""Set-up of a run from its config: processes, data, model, training step and run folder."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gptfast import devices, flops, hardware, load_model, optim, tokenizers
from gptfast.backend import parse_backend
from gptfast.checkpoint import run_folder
from gptfast.checkpoint.atomic_files import read_json
from gptfast.checkpoint.manager import Checkpoint, CheckpointManager
from gptfast.checkpoint.run_folder import RunFolder
from gptfast.distributed import World
from gptfast.model import GPT
from gptfast.tokenizers import Tokenizer
from gptfast.training import dataset, finetuning, progress
from gptfast.training.config import FIXED, TrainConfig
from gptfast.training.dataset import Dataset
from gptfast.training.progress import Progress
from gptfast.training.saver import Saver
from gptfast.training.throughput import Throughput
from gptfast.training.train_state import TrainState
from gptfast.training.train_step import TrainStep
from gptfast.training.validation import Evaluator


@dataclass(frozen=True)
class Run:
    """A run that is ready for its next step, of which `first` are done."""

    config: TrainConfig  # with the model's final shape
    world: World
    dataset: Dataset
    state: TrainState
    evaluator: Evaluator
    saver: Saver
    throughput: Throughput
    progress: Progress
    first: int


@contextlib.contextmanager
def setup(config: TrainConfig, name: str) -> Iterator[Run]:
    """Build a run, and release its folder and its processes at the end.

    All settings and data are checked before the folder is created: `config.out`, or runs/`name`. A new folder is
    removed again if the first step fails.

    Raises:
        ValueError: settings, data or weights that are wrong or do not fit each other.
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
    config, data, model = _build_model(config, device)
    peak = hardware.peak_flops(device, dtype)
    roofline = flops.roofline_tokens_per_second(config.model, None if peak is None else peak * world.size)
    with world:
        world.connect(device)
        with _open_folder(config, name, world) as (path, folder):
            checkpoints = CheckpointManager(path / "checkpoints", config.keep_checkpoints)
            saved, damaged = checkpoints.latest() if config.resume else (None, [])
            first = 0 if saved is None else saved.step
            _require_steps(first, config, path, world)
            state = _build_state(config, model, dtype, world, saved)
            evaluator = Evaluator(config, data, dtype, world)
            if saved is not None:
                _require_same_data(saved, data, config, path)
            best = saved.state["best"] if saved is not None else {"val_loss": None, "train_loss": None}
            if folder is not None:
                for problem in damaged:
                    print(f"continuing from an older checkpoint: {problem}", flush=True)
                checkpoints.clean()
                folder.truncate_log(first)
                folder.write_json("config.json", dataclasses.asdict(config))
                folder.write_json("tokenizer.json", data.tokenizer.to_json())
            del saved  # frees its memory for the run
            saver = Saver(state, path, folder, checkpoints, best, data.fingerprints)
            throughput = Throughput(config.batch_size * config.model.block_size, roofline)
            bar = Progress(folder, config.steps, first, config.tensorboard)
            yield Run(config, world, data, state, evaluator, saver, throughput, bar, first)


def _build_model(config: TrainConfig, device: torch.device) -> tuple[TrainConfig, Dataset, GPT]:
    """Load data and first weights; return the config with the model's final shape."""
    backend = parse_backend(config.backend)
    resumed = Path(config.out) if config.resume and config.out and run_folder.is_run(Path(config.out)) else None
    # a run with checkpoints no longer needs the weights that it started from
    has_checkpoints = resumed is not None and CheckpointManager(resumed / "checkpoints", 1).exist()
    pretrained, tokenizer = None, None
    if config.init_from and not has_checkpoints:
        pretrained, tokenizer = finetuning.load_pretrained(config.init_from, config.model)
    if resumed is not None:
        tokenizer = tokenizers.from_json(read_json(resumed / "tokenizer.json"))
    data = dataset.load(config, tokenizer)
    _require_prompt(config, data.tokenizer)
    if pretrained is not None:
        load_model.require_same_vocabulary(str(config.init_from), pretrained, data.tokenizer)
        shape = pretrained.config
    elif config.init_from and resumed is not None:
        shape = finetuning.merge_config(run_folder.read_config(resumed)[1], config.model)
    else:
        shape = dataclasses.replace(config.model, vocab_size=data.tokenizer.vocab_size)
    config = dataclasses.replace(config, model=shape)
    if resumed is not None:
        _require_same_settings(config, resumed)
    torch.manual_seed(config.seed)
    model = GPT(shape, backend) if pretrained is None else pretrained
    model.to(device).set_backend(backend)
    if config.residual_dtype != "auto":
        model.set_residual_dtype(getattr(torch, config.residual_dtype))
    model.set_activation_checkpointing(config.checkpoint_activations)
    finetuning.select_trainable(model, config)
    return config, data, model


def _build_state(
    config: TrainConfig, model: GPT, dtype: torch.dtype, world: World, saved: Checkpoint | None
) -> TrainState:
    """Wrap the model, build optimizers and step, and load a checkpoint into them."""
    if saved is not None:
        TrainState.load_weights(model, saved)
    wrapped = world.wrap(model, model.transformer.h, config.parallel, config.compile)
    betas, device_type = (config.beta1, config.beta2), model.lm_head.weight.device.type
    optimizers = optim.build(
        config.optimizer, model.named_parameters(), config.weight_decay, config.learning_rate, betas, device_type
    )
    compiled = config.compile and world.is_single  # else `wrap` has compiled the model
    step = TrainStep(wrapped, optimizers, config.accumulation, config.grad_clip, dtype, compiled)
    state = TrainState(model, step)
    if saved is not None:
        state.load_optimizers(saved)
    return state


@contextlib.contextmanager
def _open_folder(config: TrainConfig, name: str, world: World) -> Iterator[tuple[Path, RunFolder | None]]:
    """Create or reopen the run folder on rank 0; every rank gets its path."""
    folder: RunFolder | None = None

    def open_on_main() -> str:
        nonlocal folder
        folder = RunFolder(Path(config.out) if config.out else _unused_path(name), config.resume)
        return str(folder.path)

    path = Path(world.run_on_main(open_on_main))
    with folder or contextlib.nullcontext():
        yield path, folder


def _unused_path(name: str) -> Path:
    path, number = Path("runs", name), 2
    while path.exists():
        path, number = Path("runs", f"{name}-{number}"), number + 1
    return path


def _require_prompt(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raise ValueError unless the tokenizer can encode the prompt of samples."""
    prompt = config.sample_prompt
    if not (config.sample_tokens and prompt):
        return
    try:
        ids = tokenizer.encode(prompt)
    except ValueError as error:
        raise ValueError(f"sample_prompt {prompt!r}: {error}; give another with --sample-prompt") from error
    if len(ids) == 0:
        raise ValueError(f"sample_prompt {prompt!r} has no tokens; give at least one word with --sample-prompt")


def _require_same_settings(config: TrainConfig, path: Path) -> None:
    """Raise ValueError if the config changes the run's model, or another setting that a resumed run cannot change."""
    settings, model = run_folder.read_config(path)
    saved = {**settings, **dataclasses.asdict(model)}
    # vocabulary padding may change: checkpoints leave it out
    shape = {name: value for name, value in dataclasses.asdict(config.model).items() if name != "pad_vocab_size_to"}
    for name, value in (shape | {name: getattr(config, name) for name in FIXED}).items():
        value = list(value) if isinstance(value, tuple) else value  # JSON has lists
        if value != saved.get(name):
            raise ValueError(
                f"the run in {path} has {name}={saved.get(name)!r}, which cannot change to {value!r}; give a new --out"
            )


def _require_same_data(saved: Checkpoint, data: Dataset, config: TrainConfig, path: Path) -> None:
    """Raise ValueError if the run was trained on other data."""
    for split, fingerprint in data.fingerprints.items():
        if saved.state["data"][split] != fingerprint:
            raise ValueError(
                f"{config.data} is not the data of the run in {path}: {split} was {saved.state['data'][split]}, and is "
                f"{fingerprint}; give the same data, or a new --out"
            )


def _require_steps(first: int, config: TrainConfig, path: Path, world: World) -> None:
    """Raise ValueError unless every rank sees the same checkpoint, and steps are left."""
    if int(world.sum(torch.tensor(first))) != first * world.size:
        raise ValueError(f"processes see different checkpoints in {path}; give an --out that all of them share")
    if first >= config.steps:
        raise ValueError(f"the run in {path} has done {first} steps; give a larger --steps to continue it")
