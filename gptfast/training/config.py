"""The settings of a training run: their defaults, what they mean, and their checks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gptfast import optim
from gptfast.config import GPTConfig

PARALLEL = ("ddp", "fsdp")


@dataclass
class TrainConfig:
    """Settings of a training run."""

    model: GPTConfig = field(default_factory=GPTConfig)
    data: str = "stdlib"
    """Training text: stdlib, shakespeare, chatbot, clinic, sentences, a UTF-8 text file or a folder of them, or a
    folder that `gptfast prepare` or nanoGPT wrote."""
    tokenizer: str = "char"
    """char, byte, word, or the name of a tiktoken encoding such as gpt2."""
    vocabulary: str | None = None
    """Folder with the files of a tiktoken encoding, for machines without a network."""
    held_out: float = 0.1
    """Share of the text, its end, that validation uses; 0 holds nothing out, and validation is on the training text."""
    out: str | None = None
    """Run folder to write, which must be new; by default one below runs/."""
    resume: bool = False
    """Continue the run in `out` from its last checkpoint, or begin it if there is none."""
    init_from: str | None = None
    """Begin with the weights of a run folder, of a folder in Hugging Face's layout, or of gpt2, gpt2-medium, gpt2-large
    or gpt2-xl, whose size the model then has."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that keep their values, such as "transformer.h.[0-5].*"."""
    lora_rank: int = 0
    """Train adapters of this rank beside the weights of `lora_targets`, and nothing else; 0 trains the weights."""
    lora_alpha: float = 16.0
    """Size of what the adapters add, for any rank."""
    lora_targets: tuple[str, ...] = ("*.attn.c_attn", "*.attn.c_proj", "*.mlp.c_fc", "*.mlp.c_proj")
    """Patterns of the linear layers that get adapters."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    parallel: str = "ddp"
    """How the processes that torchrun starts share the work: ddp (each has the model) or fsdp (each has a part)."""
    dtype: str = "auto"
    """Arithmetic of matrix products: float32, bfloat16, float16, or auto: bfloat16 on devices that multiply in it."""
    backend: str = "auto"
    """auto, triton, cpu, eager (plain PyTorch), or choices by operator such as attention=triton,ffn=eager."""
    compile: bool = False
    """Compile the model with torch.compile."""
    checkpoint_activations: bool = False
    """Compute each block's activations anew in the backward, for less memory."""
    residual_dtype: str = "auto"
    """The residual stream's: float32, bfloat16, or auto, which is that of the weights. Half as wide is less memory."""
    steps: int = 5000
    """Optimizer steps."""
    batch_size: int = 64
    """Sequences per step, of all processes."""
    accumulation: int = 1
    """Parts, equal in size, in which a process's batch goes through the model, for less memory."""
    optimizer: str = "adamw"
    """adamw, or muon for the blocks' matrices and adamw for all else."""
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
    """Decay of matrices and embeddings."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.99
    """AdamW's decay of the mean squared gradient."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    eval_interval: int = 250
    """Steps between evaluations."""
    eval_batches: int = 20
    """Batches of each split that an evaluation reads."""
    sample_tokens: int = 64
    """Tokens of the sample that each evaluation shows; 0 shows none."""
    sample_prompt: str = ""
    """What samples continue; by default the end of a document, or of a line."""
    checkpoint_interval: int = 250
    """Steps between checkpoints; 0 writes none but at an interrupt and at the end."""
    keep_checkpoints: int = 2
    """How many of the last checkpoints are kept."""
    log_interval: int = 10
    """Steps between lines of the log."""
    tensorboard: bool = False
    """Log for TensorBoard too, which must be installed."""
    seed: int = 1337
    """Seed of weights, batches and dropout."""

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulation", "eval_interval", "eval_batches", "log_interval")
        for name in (*counts, "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lora_rank", "sample_tokens", "checkpoint_interval"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        # far beyond any memory, and what NumPy says of sizes beyond its index names no setting
        if self.batch_size >= 2**31:
            raise ValueError(f"batch_size must be below 2**31, got {self.batch_size}")
        if self.batch_size % self.accumulation != 0:
            raise ValueError(
                f"batch_size must be a multiple of accumulation={self.accumulation}, got {self.batch_size}"
            )
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {self.seed}")
        for name in ("learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "grad_clip", "lora_alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name, accepted in (
            ("residual_dtype", ("auto", "float32", "bfloat16")),
            ("schedule", optim.SCHEDULES),
            ("optimizer", optim.OPTIMIZERS),
            ("parallel", PARALLEL),
        ):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}")
        if not 0.0 <= self.decay_share <= 1.0:
            raise ValueError(f"decay_share must be in [0, 1], got {self.decay_share}")
        if not 0.0 <= self.held_out < 1.0:
            raise ValueError(f"held_out must be in [0, 1), got {self.held_out}")
        if self.resume and self.out is None:
            raise ValueError("resume needs the folder of the run: give it with --out")
        self.freeze, self.lora_targets = tuple(self.freeze), tuple(self.lora_targets)  # JSON has lists
        if self.freeze and self.lora_rank:
            raise ValueError("freeze and lora_rank exclude each other: with adapters all other parameters are frozen")


# what a run keeps when it is taken up again, beside its model: another of these would make it another run
FIXED = ("tokenizer", "held_out", "freeze", "lora_rank", "lora_alpha", "lora_targets", "batch_size",
         "optimizer", "seed")  # fmt: skip
