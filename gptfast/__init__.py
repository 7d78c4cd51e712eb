"""A GPT whose layer norm, feed-forward, attention and loss each switch between a Triton kernel and eager PyTorch."""

from gptfast.backend import Backend
from gptfast.config import GPTConfig
from gptfast.model import GPT
from gptfast.step import TrainStep

__all__ = ["GPT", "Backend", "GPTConfig", "TrainStep"]
__version__ = "0.1.0"
