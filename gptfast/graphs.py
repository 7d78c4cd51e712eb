"""CUDA graphs: the kernels of a function recorded once and launched together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def capture(function: Callable[[], None], pool: Any, stream: torch.cuda.Stream) -> Callable[[], None]:
    """Record the kernels that a function launches, without running them; the result launches them again."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        function()
    return graph.replay
