"""A training step gives what a plain PyTorch loop gives, in parts, compiled or captured."""

from __future__ import annotations

import contextlib
import functools
import inspect

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import gptfast.cuda_graphs
import gptfast.training.train_step
from gptfast import GPT, GPTConfig, TrainStep
from tests.support.oracle import DEVICE

CONFIG = GPTConfig(block_size=8, vocab_size=31, n_layer=2, n_head=2, n_embd=32)
EPS = 1e-3  # Adam's own would make whole steps of gradients that are zero but for rounding, such as of keys' biases


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


OPTIMIZERS = {"fused": adamw, "unfused": unfused, "SGD": sgd}


def batches(count: int, ignored: bool = False, size: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and targets [4, 8]; some targets, more in later rows, do not count."""
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


def plain(model: GPT, optimizer: torch.optim.Optimizer, given: list, grad_clip: float) -> list[tuple[float, float]]:
    """The loop that everybody writes."""
    outcome = []
    for idx, targets in given:
        _, loss = model(idx, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or float("inf"))
        optimizer.step()
        outcome.append((loss.item(), norm.item()))
    return outcome


def assert_same_training(model: GPT, outcome: list, expected_model: GPT, expected: list, tolerance: float = 1e-5):
    torch.testing.assert_close(torch.tensor(outcome), torch.tensor(expected), rtol=tolerance, atol=tolerance)
    for name, parameter in expected_model.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("grad_clip", [0.0, 0.3])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_step_is_that_of_a_plain_loop(optimizer, backend: str, accumulation: int, grad_clip: float):
    """Whole or in parts whose targets count unequally."""
    given = batches(4, ignored=True)
    expected_model, model = build(), build(backend)
    expected = plain(expected_model, optimizer(expected_model), given, grad_clip)
    assert min(norm for _, norm in expected) > 0.3  # clipping clips
    step = TrainStep(model, optimizer(model), accumulation, grad_clip)
    results = [step(*batch) for batch in given]
    outcome = [(result.loss, result.grad_norm) for result in results]
    assert_same_training(model, outcome, expected_model, expected)
    assert all(p.grad is None for p in model.parameters())


def test_a_part_without_targets_that_count_changes_nothing():
    idx, targets = batches(1)[0]
    targets = targets.clone()
    targets[2:] = -1
    expected_model, model = build(), build()
    expected = plain(expected_model, adamw(expected_model), [(idx, targets)], 1.0)
    result = TrainStep(model, adamw(model), 2, 1.0)(idx, targets)
    assert_same_training(model, [(result.loss, result.grad_norm)], expected_model, expected)


def test_gradients_that_are_not_finite_change_nothing():
    """Neither weights nor the optimizer's state; the step after it is as if nothing had been."""
    (idx, targets), following = batches(2)
    expected_model, model = build(), build()
    optimizer = adamw(model)
    step = TrainStep(model, optimizer, grad_clip=1.0)
    hook = model.transformer.ln_f.weight.register_hook(lambda gradient: gradient * float("inf"))
    result = step(idx, targets)
    assert not torch.tensor(result.grad_norm).isfinite()
    hook.remove()
    outcome = step(*following)
    expected = plain(expected_model, adamw(expected_model), [following], 1.0)
    assert_same_training(model, [(outcome.loss, outcome.grad_norm)], expected_model, expected)


@pytest.fixture
def captures(monkeypatch) -> list[str]:
    """Graphs in form alone, for machines without a GPU: what is captured is called at each replay.

    As a graph does, it reads and writes the gradients of its capture, wherever the parameters' are by then.
    """
    made: list[str] = []

    def capture(function, pool, stream):
        made.append(function.__name__)
        parameters = [
            p for group in inspect.getclosurevars(function).nonlocals["self"]._groups for p in group["params"]
        ]
        if function.__name__ != "update":
            with torch.random.fork_rng():
                function()
        held = [parameter.grad for parameter in parameters]

        def replay() -> None:
            if function.__name__ == "first":
                function()
                for parameter, gradient in zip(parameters, held, strict=True):
                    gradient.copy_(parameter.grad)
            before = [parameter.grad for parameter in parameters]
            for parameter, gradient in zip(parameters, held, strict=True):
                parameter.grad = gradient
            if function.__name__ != "first":
                function()
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient

        return replay

    class Stream:
        def wait_stream(self, other):
            pass

    if DEVICE.type != "cuda":
        monkeypatch.setattr(gptfast.cuda_graphs, "capture", capture)
        monkeypatch.setattr(gptfast.cuda_graphs, "capture_stream", lambda device: Stream())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return made


def captured_step(model: GPT, optimizer: torch.optim.Optimizer, **settings) -> TrainStep:
    step = TrainStep(model, optimizer, graph=DEVICE.type == "cuda", **settings)
    if not step.graph:
        step._capture_on(torch.device("cuda"))
    return step


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("optimizer", [adamw, sgd], ids=["fused", "SGD"])
def test_a_captured_step_is_that_of_a_plain_loop(captures, optimizer, accumulation: int):
    """With learning rates that change, and an optimizer that cannot be captured."""
    given = batches(7, ignored=True)
    expected_model, model = build(), build()
    expected_optimizer, own = optimizer(expected_model), optimizer(model)
    step = captured_step(model, own, accumulation=accumulation, grad_clip=0.3)
    outcome, expected = [], []
    for number, batch in enumerate(given):
        for group in (*own.param_groups, *expected_optimizer.param_groups):
            group["lr"] = 0.01 * (number + 1)
        expected += plain(expected_model, expected_optimizer, [batch], 0.3)
        result = step(*batch)
        outcome.append((result.loss, result.grad_norm))
    assert_same_training(model, outcome, expected_model, expected)
    # a graph reads rates where they lie: of an optimizer that it holds they must be tensors
    assert all(isinstance(group["lr"], torch.Tensor) is (optimizer is adamw) for group in own.param_groups)
    if DEVICE.type != "cuda":
        assert captures == ["first"] + ["more"] * (accumulation > 1) + ["update"] * (optimizer is adamw)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_update_for_which_the_host_waits_is_not_captured(captures, optimizer):
    """In float16 that of all optimizers but fused ones: the host asks whether gradients have overflowed."""
    given = batches(5)
    expected_model, model = build(), build()
    expected = plain(expected_model, optimizer(expected_model), given, 0.3)
    step = captured_step(model, optimizer(model), grad_clip=0.3, dtype=torch.float16)
    outcome = [(result.loss, result.grad_norm) for result in (step(*batch) for batch in given)]
    assert_same_training(model, outcome, expected_model, expected, tolerance=5e-3)
    if DEVICE.type != "cuda":
        assert captures == ["first"] + ["update"] * (optimizer is adamw)


@pytest.mark.parametrize("optimizer", [adamw, sgd], ids=["fused", "SGD"])
def test_batches_of_two_sizes_take_turns(captures, optimizer):
    """Each has its graphs and their gradients, which the other's steps do not touch."""
    given = [batch for pair in zip(batches(6), batches(6, size=2), strict=True) for batch in pair]
    expected_model, model = build(), build()
    expected = plain(expected_model, optimizer(expected_model), given, 0.3)
    step = captured_step(model, optimizer(model), grad_clip=0.3)
    outcome = [(result.loss, result.grad_norm) for result in (step(*batch) for batch in given)]
    assert_same_training(model, outcome, expected_model, expected)
    assert len(step._graphs) == 2


def test_a_scheduler_sets_the_rate_of_a_captured_step(captures):
    given = batches(6)
    expected_model, model = build(), build()
    expected_optimizer, own = adamw(expected_model), adamw(model)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1.0 / (n + 1)) for o in (expected_optimizer, own)]
    step = captured_step(model, own)
    outcome, expected = [], []
    for batch in given:
        expected += plain(expected_model, expected_optimizer, [batch], 0.0)
        result = step(*batch)
        outcome.append((result.loss, result.grad_norm))
        for scheduler in schedulers:
            scheduler.step()
    assert_same_training(model, outcome, expected_model, expected)


def test_another_shape_mode_or_setting_is_captured_anew(captures):
    model = build()
    optimizer = adamw(model)
    step = captured_step(model, optimizer)
    small = batches(8, size=2)
    for batch in [*batches(4), *small[:4]]:
        step(*batch)
    assert len(step._graphs) == 2
    optimizer.param_groups[0]["weight_decay"] = 0.2
    for batch in small[4:]:
        step(*batch)
    assert len(step._graphs) == 3


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_compiled_step_is_one_graph_and_compiles_once(monkeypatch, backend: str):
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=graphs))
    given = batches(4)
    expected_model, model = build(), build(backend)
    expected = plain(expected_model, adamw(expected_model), given, 0.3)
    step = TrainStep(model, adamw(model), grad_clip=0.3, compiled=True, graph=False)
    outcome = []
    for batch in given:
        result = step(*batch)
        outcome.append((result.loss, result.grad_norm))
        assert graphs.frame_count == 1
    assert_same_training(model, outcome, expected_model, expected)
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_products_in_bfloat16_and_parameters_in_float32(backend: str):
    model, exact = build(backend), build()
    results = [
        TrainStep(m, adamw(m), dtype=d)(*batches(1)[0]) for m, d in ((model, torch.bfloat16), (exact, torch.float32))
    ]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert results[0].loss != results[1].loss
    assert results[0].loss == pytest.approx(results[1].loss, rel=0.01)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=0.05)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_float16_scales_its_loss(optimizer):
    """Outcomes are not scaled; they are float32's but for what rounding does."""
    given = batches(4)
    expected_model, model = build(), build()
    expected = plain(expected_model, optimizer(expected_model), given, 0.3)
    step = TrainStep(model, optimizer(model), grad_clip=0.3, dtype=torch.float16)
    results = [step(*batch) for batch in given]
    outcome = [(result.loss, result.grad_norm) for result in results]
    assert_same_training(model, outcome, expected_model, expected, tolerance=5e-3)
    assert {result.loss_scale for result in results} == {2.0**16}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_float16_gradient_that_overflows_halves_the_scale_and_changes_nothing(optimizer):
    first, second, third = batches(3)
    expected_model, model = build(), build()
    steps = [TrainStep(m, optimizer(m), grad_clip=0.3, dtype=torch.float16) for m in (expected_model, model)]
    for step in steps:
        step(*first)
    hook = model.transformer.ln_f.weight.register_hook(lambda gradient: gradient * float("inf"))
    assert not torch.tensor(steps[1](*second).grad_norm).isfinite()
    hook.remove()
    results = [step(*third) for step in steps]
    assert [result.loss_scale for result in results] == [2.0**16, 2.0**15]
    outcome, expected = ([(result.loss, result.grad_norm)] for result in reversed(results))
    assert_same_training(model, outcome, expected_model, expected, tolerance=1e-3)


def test_the_scale_grows_and_is_carried_on(monkeypatch):
    monkeypatch.setattr(gptfast.training.train_step, "_GROWTH_INTERVAL", 3)
    model = build()
    step = TrainStep(model, adamw(model), dtype=torch.float16)
    assert [step(*batch).loss_scale for batch in batches(5)] == [2.0**16] * 3 + [2.0**17] * 2
    again = TrainStep(model, adamw(model), dtype=torch.float16)
    again.load_state_dict(step.state_dict())
    assert [again(*batch).loss_scale for batch in batches(2)] == [2.0**17, 2.0**18]
    other = TrainStep(model, adamw(model), dtype=torch.bfloat16)
    other.load_state_dict(step.state_dict())
    assert other(*batches(1)[0]).loss_scale == 1.0
    assert other.state_dict() == {}


def test_several_optimizers_clip_by_one_norm():
    """AdamW for the blocks' matrices, SGD for all else: a fused one and one that is not."""

    def both(model: GPT) -> list[torch.optim.Optimizer]:
        hidden = [p for p in model.transformer.h.parameters() if p.dim() == 2]
        rest = [p for p in model.parameters() if not any(p is other for other in hidden)]
        return [torch.optim.AdamW(hidden, 1e-2, eps=EPS, fused=True), torch.optim.SGD(rest, 0.5, momentum=0.9)]

    given = batches(4)
    expected_model, model = build(), build()
    expected_optimizers, expected = both(expected_model), []
    for idx, targets in given:
        _, loss = expected_model(idx, targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(expected_model.parameters(), 0.3)
        for optimizer in expected_optimizers:
            optimizer.step()
            optimizer.zero_grad()
        expected.append((loss.item(), norm.item()))
    step = TrainStep(model, both(model), grad_clip=0.3)
    results = [step(*batch) for batch in given]
    assert_same_training(model, [(r.loss, r.grad_norm) for r in results], expected_model, expected)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_a_replay_waits_for_nothing_and_draws_dropout_anew(compiled: bool):
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


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_checkpointing_with_dropout_cannot_be_captured():
    model = build("triton", dropout=0.5)
    model.set_activation_checkpointing()
    step = TrainStep(model, adamw(model))
    first, second, third = batches(3)
    step(*first)
    step(*second)
    with pytest.raises(ValueError, match="activation checkpointing draws dropout twice"):
        step(*third)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulation": 0}, "accumulation must be at least 1, got 0"),
        ({"grad_clip": -1.0}, "grad_clip must be at least 0 and finite, got -1.0"),
        ({"dtype": torch.float64}, "dtype must be float32, bfloat16 or float16, got torch.float64"),
        ({"graph": True}, "graph=True needs a CUDA device, the model is on cpu"),
    ],
)
def test_bad_settings(settings, message):
    model = build().cpu()
    with pytest.raises(ValueError, match=message):
        TrainStep(model, unfused(model), **settings)


def test_a_batch_that_cannot_be_divided():
    model = build()
    with pytest.raises(ValueError, match="a batch of 4 sequences cannot be divided by accumulation=3"):
        TrainStep(model, adamw(model), accumulation=3)(*batches(1)[0])
