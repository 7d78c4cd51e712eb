"""A GPT whose layer norm, feed-forward and attention each switch between a Triton kernel and eager PyTorch."""

from gptfast.backend import Backend
from gptfast.config import GPTConfig
from gptfast.model import GPT

__all__ = ["GPT", "Backend", "GPTConfig"]
__version__ = "0.1.0"
