"""A GPT whose layer norm, feed-forward, attention and loss each switch between a Triton kernel and eager PyTorch."""

from gptfast.backend import Backend
from gptfast.config import GPTConfig
from gptfast.model import GPT
from gptfast.sampling import Sampling
from gptfast.step import TrainStep
from gptfast.texts import generate_text

__all__ = ["GPT", "Backend", "GPTConfig", "Sampling", "TrainStep", "generate_text"]
__version__ = "0.1.0"
