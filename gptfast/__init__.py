"""A GPT whose layer norm, feed-forward, attention and loss each run as a Triton kernel or in PyTorch."""

from gptfast import import_guard

import_guard.require_own_kernels()  # before anything imports them

from gptfast.backend import Backend
from gptfast.config import GPTConfig
from gptfast.generation.sampling import Sampling
from gptfast.generation.speculative import Draft
from gptfast.generation.text import generate_text
from gptfast.model import GPT
from gptfast.quantization import quantize
from gptfast.training.train_step import TrainStep

__all__ = ["GPT", "Backend", "Draft", "GPTConfig", "Sampling", "TrainStep", "generate_text", "quantize"]
__version__ = "0.1.0"
