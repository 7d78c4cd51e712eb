"""CUDA graphs: record the kernels of a function once and launch them together."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
WARMUP_CALLS = 2
"""Eager calls before a capture, in which compilation, autotuning and memory settle."""


def is_available(device: torch.device) -> bool:
    """Return True if work on `device` can be captured."""
    return device.type == "cuda"


def capture(
    functions: Sequence[Callable[[], None]], device: torch.device, generator: torch.Generator | None = None
) -> list[Callable[[], None]]:
    """Record the kernels that functions launch, without running them.

    The graphs share one memory pool, so replay them in the order of `functions`. Each replay draws new numbers from
    `generator` and from PyTorch's default one. Other threads may pin memory during the capture.

    Returns:
        For each graph a function that launches it.
    """
    pool, replays = torch.cuda.graph_pool_handle(), []
    for function in functions:
        graph = torch.cuda.CUDAGraph()
        if generator is not None:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, pool=pool, stream=_capture_stream(device), capture_error_mode="thread_local"):
            function()
        replays.append(graph.replay)
    return replays


@contextlib.contextmanager
def on_capture_stream(device: torch.device) -> Iterator[None]:
    """Run work on the stream of captures, in order with the current stream.

    Autograd remembers the stream of each forward and of each gradient, so warm-up and capture must share one.
    """
    current, stream = torch.cuda.current_stream(device), _capture_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a GPU's single stream for captures: cuBLAS never frees the workspace that it keeps per stream."""
    return torch.cuda.Stream(device)


class CUDAGraphCallable(Generic[Result]):
    """A function of one tensor that is replayed from a CUDA graph from its third call on.

    The tensor keeps its shape until `reset`. All other tensors that the function reads or writes keep their addresses.

    Args:
        function: a function that only launches work on the device.
        generator: generator of the function's random numbers, besides PyTorch's default one.
    """

    def __init__(self, function: Callable[[Tensor], Result], generator: torch.Generator | None = None) -> None:
        self._function, self._generator = function, generator
        self.reset()

    def reset(self) -> None:
        """Drop the graph, so that the next calls warm up and capture again."""
        self._calls = 0
        self._input: Tensor | None = None
        self._replay: Callable[[], None] | None = None
        self._results: list[Result] = []  # one element after the capture

    def __call__(self, given: Tensor) -> Result:
        """Call the function. NOTE: the next call overwrites the result."""
        self._calls += 1
        if self._calls <= WARMUP_CALLS:
            return self._function(given)
        if self._input is None or self._replay is None:
            static = self._input = given.clone()

            def call() -> None:
                self._results[:] = [self._function(static)]

            (self._replay,) = capture([call], given.device, self._generator)
        self._input.copy_(given)
        self._replay()
        return self._results[0]
