"""Config of a training run: defaults, help texts and checks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gptfast import optim
from gptfast.config import GPTConfig

# settings that a resumed run cannot change, besides its model
FIXED = ("tokenizer", "held_out", "freeze", "lora_rank", "lora_alpha", "lora_targets", "batch_size",
         "optimizer", "seed")  # fmt: skip
_CHOICES = {
    "residual_dtype": ("auto", "float32", "bfloat16"),
    "schedule": optim.SCHEDULES,
    "optimizer": optim.OPTIMIZERS,
    "parallel": ("ddp", "fsdp"),
}
_RANGES = (
    (("steps", "batch_size", "accumulation", "eval_interval", "eval_batches", "log_interval", "keep_checkpoints"),
     lambda value: value >= 1, "at least 1"),
    (("lora_rank", "sample_tokens", "checkpoint_interval"), lambda value: value >= 0, "at least 0"),
    (("learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "grad_clip", "lora_alpha"),
     lambda value: 0 <= value < math.inf, "at least 0 and finite"),
    (("beta1", "beta2", "held_out"), lambda value: 0 <= value < 1, "in [0, 1)"),
    (("decay_share",), lambda value: 0 <= value <= 1, "in [0, 1]"),
    (("batch_size",), lambda value: value < 2**31, "below 2**31"),  # NumPy's error names no setting
    (("seed",), lambda value: 0 <= value < 2**64, "in [0, 2**64)"),
)  # fmt: skip


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
    """Share of the text, at its end, held out for validation; with 0 validation uses the training text."""
    out: str | None = None
    """Run folder to write, empty or new. The default is a new folder below runs/."""
    resume: bool = False
    """Continue the run in `out` from its last checkpoint; start it if there is none."""
    init_from: str | None = None
    """Start from the weights, and with the size, of a run folder, a folder in Hugging Face's layout, or gpt2,
    gpt2-medium, gpt2-large or gpt2-xl."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters to freeze, such as "transformer.h.[0-5].*"."""
    lora_rank: int = 0
    """Rank of the LoRA adapters, which are trained alone; 0 trains the weights instead."""
    lora_alpha: float = 16.0
    """Scale of the adapters' output, independent of their rank."""
    lora_targets: tuple[str, ...] = ("*.attn.c_attn", "*.attn.c_proj", "*.mlp.c_fc", "*.mlp.c_proj")
    """Patterns of the linear layers that get adapters."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    parallel: str = "ddp"
    """Data parallelism under torchrun: ddp (replicated parameters) or fsdp (sharded parameters)."""
    dtype: str = "auto"
    """Dtype of matmuls: float32, bfloat16, float16, or auto, which is bfloat16 where the hardware has it."""
    backend: str = "auto"
    """auto, triton, cpu, eager (plain PyTorch), or choices by operator such as attention=triton,ffn=eager."""
    compile: bool = False
    """Compile the model with torch.compile."""
    checkpoint_activations: bool = False
    """Recompute each block's activations in the backward pass, to save memory."""
    residual_dtype: str = "auto"
    """Dtype of the residual stream: float32, bfloat16, which saves memory, or auto, the dtype of the weights."""
    steps: int = 5000
    """Optimizer steps."""
    batch_size: int = 64
    """Sequences per step, summed over all processes."""
    accumulation: int = 1
    """Micro-batches per process and step, to save memory; gradients accumulate over them."""
    optimizer: str = "adamw"
    """adamw, or muon for the matrices of the blocks and adamw for all other parameters."""
    learning_rate: float = 1e-3
    """Peak learning rate, at the end of the warm-up."""
    schedule: str = "cosine"
    """Learning rate after the warm-up: cosine, constant, or wsd (constant, then a linear decay)."""
    min_learning_rate: float = 1e-4
    """Learning rate at the end of cosine or wsd."""
    warmup_steps: int = 100
    """Steps of the linear warm-up."""
    decay_share: float = 0.2
    """Share of the steps after the warm-up in which wsd decays."""
    weight_decay: float = 0.1
    """Weight decay of matrices and embeddings."""
    beta1: float = 0.9
    """AdamW's decay rate of the first moment."""
    beta2: float = 0.99
    """AdamW's decay rate of the second moment."""
    grad_clip: float = 1.0
    """Maximum norm of the gradient; 0 turns clipping off."""
    eval_interval: int = 250
    """Steps between evaluations."""
    eval_batches: int = 20
    """Batches of each split in an evaluation."""
    sample_tokens: int = 64
    """Tokens of the sample that an evaluation prints; 0 prints none."""
    sample_prompt: str = ""
    """Prompt of samples; by default the end-of-text token or a line break."""
    checkpoint_interval: int = 250
    """Steps between checkpoints; 0 writes them only at an interrupt and at the end."""
    keep_checkpoints: int = 2
    """Number of checkpoints to keep."""
    log_interval: int = 10
    """Steps between log entries."""
    tensorboard: bool = False
    """Also log for TensorBoard, which must be installed."""
    seed: int = 1337
    """Seed of initial weights, batches and dropout."""

    def __post_init__(self) -> None:
        for names, holds, accepted in _RANGES:
            for name in names:
                if not holds(value := getattr(self, name)):
                    raise ValueError(f"{name} must be {accepted}, got {value}")
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if self.batch_size % self.accumulation != 0:
            raise ValueError(
                f"batch_size must be a multiple of accumulation={self.accumulation}, got {self.batch_size}"
            )
        if self.resume and self.out is None:
            raise ValueError("resume needs the folder of the run; give it with --out")
        self.freeze, self.lora_targets = tuple(self.freeze), tuple(self.lora_targets)  # JSON has lists
        if self.freeze and self.lora_rank:
            raise ValueError("freeze excludes lora_rank, which freezes all parameters but the adapters; give one")
