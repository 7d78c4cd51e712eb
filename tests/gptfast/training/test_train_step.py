"""A training step gives what a plain PyTorch loop gives: accumulated, compiled, captured or scaled."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from gptfast import GPT, GPTConfig, TrainStep, cuda_graphs
from tests.support.oracle import DEVICE

CONFIG = GPTConfig(block_size=8, vocab_size=31, n_layer=2, n_head=2, n_embd=32)
EPS = 1e-3  # Adam's default would turn gradients that are zero but for rounding, as of key biases, into full steps
ON_GPU = DEVICE.type == "cuda"


def build(backend: str = "eager", **settings) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**vars(CONFIG), **settings}), backend).to(DEVICE)


def adamw(model: GPT) -> torch.optim.Optimizer:
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), DEVICE.type)
    for group in optimizer.param_groups:
        group["eps"] = EPS
    return optimizer


def unfused(model: GPT) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-2, eps=EPS)


def sgd(model: GPT) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)


def adamw_and_sgd(model: GPT) -> list[torch.optim.Optimizer]:
    """A fused optimizer for the weight matrices of the blocks, one that is not fused for the rest."""
    hidden = {p for p in model.transformer.h.parameters() if p.dim() == 2}
    rest = [p for p in model.parameters() if p not in hidden]
    return [torch.optim.AdamW(list(hidden), 1e-2, eps=EPS, fused=True), torch.optim.SGD(rest, 0.5, momentum=0.9)]


OPTIMIZERS = {"fused": adamw, "unfused": unfused, "SGD": sgd}
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
# the second one has no implementation that a graph can hold
captured_or_not = pytest.mark.parametrize("optimizer", [adamw, sgd], ids=["fused", "SGD"])


def batches(count: int, ignored: bool = False, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Token ids and targets [size, 8]; with `ignored`, later rows have fewer targets that count."""
    generator = torch.Generator().manual_seed(1)
    drawn = []
    for _ in range(count):
        tokens = torch.randint(31, (size, 9), generator=generator).to(DEVICE)
        targets = tokens[:, 1:].clone()
        if ignored:
            for row in range(size):
                targets[row, : 2 * row] = -1
        drawn.append((tokens[:, :-1], targets))
    return drawn


Outcome = list[tuple[float, float]]


def plain(model: GPT, optimizers, given: list, grad_clip: float) -> Outcome:
    """Loss and norm of each step of the usual PyTorch loop."""
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    outcome = []
    for idx, targets in given:
        _, loss = model(idx, targets)
        model.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or float("inf"))
        for optimizer in optimizers:
            optimizer.step()
        outcome.append((loss.item(), norm.item()))
    return outcome


def run(step: TrainStep, given: list) -> Outcome:
    return [(result.loss, result.grad_norm) for result in (step(*batch) for batch in given)]


def assert_same_training(
    model: GPT, outcome: Outcome, expected_model: GPT, expected: Outcome, tolerance: float = 1e-5
) -> None:
    torch.testing.assert_close(torch.tensor(outcome), torch.tensor(expected), rtol=tolerance, atol=tolerance)
    for name, parameter in expected_model.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=tolerance, atol=tolerance, msg=name)


def assert_equals_plain_loop(
    optimizer, given: list, grad_clip: float, make_step=TrainStep, backend: str = "eager", tolerance: float = 1e-5,
    **settings,
) -> GPT:  # fmt: skip
    """Train a model by a step and its twin by the usual loop; return the model."""
    expected_model, model = build(), build(backend)
    expected = plain(expected_model, optimizer(expected_model), given, grad_clip)
    assert grad_clip == 0.0 or min(norm for _, norm in expected) > grad_clip  # clipping clips
    outcome = run(make_step(model, optimizer(model), grad_clip=grad_clip, **settings), given)
    assert_same_training(model, outcome, expected_model, expected, tolerance)
    return model


def overflow(model: GPT) -> torch.utils.hooks.RemovableHandle:
    """Make a gradient infinite until the handle is removed."""
    return model.transformer.ln_f.weight.register_hook(lambda gradient: gradient * float("inf"))


@pytest.mark.parametrize("grad_clip", [0.0, 0.3])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize(
    "optimizer", [*OPTIMIZERS.values(), adamw_and_sgd], ids=[*OPTIMIZERS, "two optimizers, one norm"]
)
def test_train_step_equals_a_plain_loop(optimizer, backend: str, accumulation: int, grad_clip: float):
    given = batches(4, ignored=True)
    model = assert_equals_plain_loop(optimizer, given, grad_clip, backend=backend, accumulation=accumulation)
    assert all(p.grad is None for p in model.parameters())


def test_train_step_ignores_a_micro_batch_without_targets():
    idx, targets = batches(1)[0]
    targets = targets.clone()
    targets[2:] = -1
    assert_equals_plain_loop(adamw, [(idx, targets)], 0.3, accumulation=2)


def test_train_step_skips_gradients_that_are_not_finite():
    """Weights and optimizer state stay: the next step is as if there had been none before it."""
    first, second = batches(2)
    expected_model, model = build(), build()
    step = TrainStep(model, adamw(model), grad_clip=1.0)
    handle = overflow(model)
    assert not torch.tensor(step(*first).grad_norm).isfinite()
    handle.remove()
    expected = plain(expected_model, adamw(expected_model), [second], 1.0)
    assert_same_training(model, run(step, [second]), expected_model, expected)


class Graphs:
    """Stand-ins for CUDA graphs on a machine without a GPU: a replay calls the function that was captured.

    As a graph does, it reads and writes the gradients of its capture, also when parameters have others by then.
    """

    def __init__(self) -> None:
        self.captures = 0
        self.parameters: list[Tensor] = []

    def capture(self, functions: Sequence[Callable[[], None]], device: torch.device) -> list[Callable[[], None]]:
        self.captures += len(functions)
        functions[0]()  # the backward of a first micro-batch allocates gradients; the capture of others changes nothing
        held = [parameter.grad for parameter in self.parameters]

        def replay(function: Callable[[], None]) -> None:
            before = self.set_gradients(held)
            function()
            for gradient, written in zip(held, self.set_gradients(before), strict=True):
                if written is not gradient:
                    gradient.copy_(written)

        return [functools.partial(replay, function) for function in functions]

    def set_gradients(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients before."""
        before = [parameter.grad for parameter in self.parameters]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return before


@pytest.fixture
def graphs(monkeypatch) -> Graphs:
    stand_in = Graphs()
    if not ON_GPU:
        monkeypatch.setattr(cuda_graphs, "is_available", lambda device: True)
        monkeypatch.setattr(cuda_graphs, "capture", stand_in.capture)
        monkeypatch.setattr(cuda_graphs, "on_capture_stream", lambda device: contextlib.nullcontext())
    return stand_in


def captured_step(graphs: Graphs, model: GPT, optimizer: torch.optim.Optimizer, **settings) -> TrainStep:
    graphs.parameters = list(model.parameters())
    return TrainStep(model, optimizer, **settings)


@pytest.mark.parametrize("accumulation", [1, 2])
@captured_or_not
def test_captured_step_equals_a_plain_loop(graphs, optimizer, accumulation: int):
    """With learning rates that change."""
    expected_model, model = build(), build()
    expected_optimizer, own = optimizer(expected_model), optimizer(model)
    step = captured_step(graphs, model, own, accumulation=accumulation, grad_clip=0.3)
    outcome, expected = [], []
    for number, batch in enumerate(batches(7, ignored=True)):
        for group in (*own.param_groups, *expected_optimizer.param_groups):
            group["lr"] = 0.01 * (number + 1)
        expected += plain(expected_model, expected_optimizer, [batch], 0.3)
        outcome += run(step, [batch])
    assert_same_training(model, outcome, expected_model, expected)
    # a graph reads a rate from its address
    assert all(isinstance(group["lr"], Tensor) is (optimizer is adamw) for group in own.param_groups)
    assert ON_GPU or graphs.captures == accumulation + (optimizer is adamw)


@each_optimizer
def test_captured_step_leaves_out_an_update_that_the_host_waits_for(graphs, optimizer):
    """In float16 only fused optimizers skip an overflow by themselves."""
    make_step = functools.partial(captured_step, graphs)
    assert_equals_plain_loop(optimizer, batches(5), 0.3, make_step, tolerance=5e-3, dtype=torch.float16)
    assert ON_GPU or graphs.captures == 1 + (optimizer is adamw)


@captured_or_not
def test_captured_step_keeps_graphs_of_two_batch_sizes_apart(graphs, optimizer):
    given = [batch for pair in zip(batches(6), batches(6, size=2), strict=True) for batch in pair]
    assert_equals_plain_loop(optimizer, given, 0.3, functools.partial(captured_step, graphs))
    assert ON_GPU or graphs.captures == 2 * (1 + (optimizer is adamw))


def test_captured_step_follows_a_scheduler(graphs):
    expected_model, model = build(), build()
    expected_optimizer, own = adamw(expected_model), adamw(model)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1.0 / (n + 1)) for o in (expected_optimizer, own)]
    step = captured_step(graphs, model, own)
    outcome, expected = [], []
    for batch in batches(6):
        expected += plain(expected_model, expected_optimizer, [batch], 0.0)
        outcome += run(step, [batch])
        for scheduler in schedulers:
            scheduler.step()
    assert_same_training(model, outcome, expected_model, expected)


@pytest.mark.skipif(ON_GPU, reason="counts the captures of stand-ins")
def test_captured_step_is_captured_again_for_another_shape_mode_or_setting(graphs):
    model = build()
    optimizer = adamw(model)
    step = captured_step(graphs, model, optimizer)
    for change, captures in (
        (lambda: None, 2),
        (lambda: model.eval(), 4),
        (lambda: optimizer.param_groups[0].update(weight_decay=0.2), 6),
    ):
        change()
        run(step, batches(4))
        assert graphs.captures == captures
    run(step, batches(4, size=2))
    assert graphs.captures == 8


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_compiled_step_is_one_graph_and_compiles_once(monkeypatch, backend: str):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    given = batches(4)
    expected_model, model = build(), build(backend)
    expected = plain(expected_model, adamw(expected_model), given, 0.3)
    step = TrainStep(model, adamw(model), grad_clip=0.3, compiled=True, graph=False)
    outcome = []
    for batch in given:
        outcome += run(step, [batch])
        assert counter.frame_count == 1
    assert_same_training(model, outcome, expected_model, expected)
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_bfloat16_step_keeps_parameters_in_float32(backend: str):
    model, exact = build(backend), build()
    rounded = TrainStep(model, adamw(model), dtype=torch.bfloat16)(*batches(1)[0])
    expected = TrainStep(exact, adamw(exact))(*batches(1)[0])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert rounded.loss != expected.loss
    assert rounded.loss == pytest.approx(expected.loss, rel=0.01)
    assert rounded.grad_norm == pytest.approx(expected.grad_norm, rel=0.05)


@each_optimizer
def test_float16_overflow_halves_the_scale_and_changes_nothing(optimizer):
    first, second, third = batches(3)
    expected_model, model = build(), build()
    models = expected_model, model
    expected_step, step = (TrainStep(m, optimizer(m), grad_clip=0.3, dtype=torch.float16) for m in models)
    expected_step(*first)
    step(*first)
    handle = overflow(model)
    assert not torch.tensor(step(*second).grad_norm).isfinite()
    handle.remove()
    expected, result = expected_step(*third), step(*third)
    assert (expected.loss_scale, result.loss_scale) == (2.0**16, 2.0**15)
    outcomes = ([(r.loss, r.grad_norm)] for r in (result, expected))
    assert_same_training(model, next(outcomes), expected_model, next(outcomes), tolerance=1e-3)


def test_loss_scale_doubles_after_2000_steps_and_is_saved():
    model = build()
    step = TrainStep(model, adamw(model), dtype=torch.float16)
    step(*batches(1)[0])
    saved = step.state_dict()
    assert {name: value.item() for name, value in saved.items()} == {"scale": 2.0**16, "grown": 1}
    again = TrainStep(model, adamw(model), dtype=torch.float16)
    again.load_state_dict(saved | {"grown": torch.tensor(1998)})
    assert [again(*batch).loss_scale for batch in batches(4)] == [2.0**16, 2.0**16, 2.0**17, 2.0**17]
    other = TrainStep(model, adamw(model), dtype=torch.bfloat16)
    other.load_state_dict(saved)
    assert (other(*batches(1)[0]).loss_scale, other.state_dict()) == (1.0, {})


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_replay_never_synchronises_and_draws_new_dropout(compiled: bool):
    model = build("triton", dropout=0.5)
    optimizer = model.configure_optimizers(0.0, 0.0, (0.9, 0.95), "cuda")  # at a rate of 0 only dropout changes
    step = TrainStep(model, optimizer, dtype=torch.bfloat16, grad_clip=1.0, compiled=compiled)
    batch = batches(1)[0]
    for _ in range(3):
        step(*batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [step(*batch) for _ in range(4)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len({result.loss for result in results}) == 4


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_capture_rejects_checkpointing_with_dropout():
    model = build("triton", dropout=0.5)
    model.set_activation_checkpointing()
    step = TrainStep(model, adamw(model))
    first, second, third = batches(3)
    step(*first)
    step(*second)
    with pytest.raises(ValueError, match="activation checkpointing"):
        step(*third)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulation": 0}, "accumulation.* 0"),
        ({"grad_clip": -1.0}, r"grad_clip.* -1\.0"),
        ({"dtype": torch.float64}, r"dtype.* torch\.float64"),
        ({"graph": True}, "graph=True.* cpu"),
    ],
)
def test_train_step_rejects_bad_settings(settings, message):
    model = build().cpu()
    with pytest.raises(ValueError, match=message):
        TrainStep(model, unfused(model), **settings)


def test_train_step_rejects_a_batch_that_cannot_be_divided():
    model = build()
    with pytest.raises(ValueError, match=r"batch of 4 .* accumulation=3"):
        TrainStep(model, adamw(model), accumulation=3)(*batches(1)[0])
