"""CUDA graphs: the kernels of a function recorded once and launched together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
_WARMUP = 2  # calls before a capture: compilation and memory settle in them


def capture(
    function: Callable[[], None], pool: Any, stream: torch.cuda.Stream, generator: torch.Generator | None = None
) -> Callable[[], None]:
    """Record the kernels that a function launches, without running them; the result launches them again.

    What a `generator` draws in it is drawn anew by every launch, as PyTorch's own generator does without being named.
    Other threads may meanwhile do what a capture forbids, such as pinning memory for the next batch.
    """
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        function()
    return graph.replay


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures on a GPU: cuBLAS keeps a workspace for each stream that it has seen, for good."""
    return torch.cuda.Stream(device)


class Replayed(Generic[Result]):
    """A function of one tensor, replayed from a CUDA graph from its third call on.

    Until `forget` the tensor keeps its shape, and all others that the function reads and writes keep their places.

    Args:
        function: what is called; all its work is the device's.
        generator: what it draws from, if anything.
    """

    def __init__(self, function: Callable[[Tensor], Result], generator: torch.Generator | None = None) -> None:
        self._function, self._generator = function, generator
        self.forget()

    def forget(self) -> None:
        """Capture anew."""
        self._calls = 0
        self._input: Tensor | None = None
        self._replay: Callable[[], None] | None = None
        self._results: list[Result] = []  # one, once there is one

    def __call__(self, given: Tensor) -> Result:
        """What the function returns. The next call overwrites it."""
        self._calls += 1
        if self._calls <= _WARMUP:
            return self._function(given)
        if self._input is None or self._replay is None:
            self._input = given.clone()
            self._replay = self._capture(self._input)
        self._input.copy_(given)
        self._replay()
        return self._results[0]

    def _capture(self, given: Tensor) -> Callable[[], None]:
        def call() -> None:
            self._results[:] = [self._function(given)]

        return capture(call, torch.cuda.graph_pool_handle(), capture_stream(given.device), self._generator)
