"""Operators on a GPU: other devices and streams, CUDA graphs, and tensors beyond 32-bit offsets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.cases import Case
from tests.support.operators import DROPOUT, OPERATORS, SMALL
from tests.support.oracle import DEVICE
from tests.support.running import Outcome, assert_equal_to_reference, assert_same_bits, call, leaves, run

pytestmark = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
FLOAT32 = torch.float32
FAR = [case for operator in OPERATORS.values() for case in operator.far]
GIB = 2**30


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_operator_on_a_device_that_is_not_current(case: Case):
    inputs, upstream = case.inputs(FLOAT32), case.upstream(FLOAT32)
    there = {name: None if t is None else t.to("cuda:1") for name, t in inputs.items()}
    outcome = run(case.kernel, case, there, {name: t.to("cuda:1") for name, t in upstream.items()})
    here = Outcome(
        {name: t.to(DEVICE) for name, t in outcome.results.items()},
        {name: t.to(DEVICE) for name, t in outcome.gradients.items() if t is not None},
    )
    assert_equal_to_reference(case, inputs, upstream, here)


def forward_and_backward(case: Case, inputs: dict[str, Tensor | None], upstream: dict[str, Tensor]) -> Outcome:
    """Gradients are returned, not stored in `.grad`, whose memory a graph would have to own."""
    results = call(case.kernel, case, inputs)
    if not case.row.differentiable:
        return Outcome({n: y.detach() for n, y in results.items()}, {})
    wanted = {name: tensor for name, tensor in inputs.items() if tensor is not None and tensor.requires_grad}
    dy = [upstream[name].to(y.dtype) for name, y in results.items()]
    gradients = torch.autograd.grad(list(results.values()), list(wanted.values()), dy)
    return Outcome({n: y.detach() for n, y in results.items()}, dict(zip(wanted, gradients, strict=True)))


def capture(case: Case, inputs: dict[str, Tensor | None], upstream: dict[str, Tensor]):
    """Capture one forward and backward; return the graph and the tensors that its replays write."""
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            forward_and_backward(case, inputs, upstream)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outcome = forward_and_backward(case, inputs, upstream)
    return graph, outcome


@torch.no_grad()
def overwrite(buffers: dict[str, Tensor | None], values: dict[str, Tensor | None]) -> None:
    for name, buffer in buffers.items():
        if buffer is not None:
            buffer.copy_(values[name])


def copied(outcome: Outcome) -> Outcome:
    return Outcome(
        {name: tensor.clone() for name, tensor in outcome.results.items()},
        {name: tensor.clone() for name, tensor in outcome.gradients.items()},
    )


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_cuda_graph_replays_with_new_values(case: Case):
    buffers = leaves(case.inputs(FLOAT32), differentiable=case.row.differentiable)
    upstream = case.upstream(FLOAT32)
    graph, outcome = capture(case, buffers, upstream)
    for seed in (1, 2):
        values = case.inputs(FLOAT32, seed=seed)
        gradients = {name: (seed + 1) * dy for name, dy in case.upstream(FLOAT32).items()}
        overwrite(buffers, values)
        overwrite(upstream, gradients)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal_to_reference(case, values, gradients, copied(outcome))


@pytest.mark.parametrize("case", DROPOUT, ids=str)
def test_cuda_graph_reads_the_seed_from_its_buffer(case: Case):
    seed = torch.tensor([5], device=DEVICE)
    inputs, upstream = case.inputs(FLOAT32), case.upstream(FLOAT32)
    graph, outcome = capture(case.with_options(seed=seed), leaves(inputs), upstream)
    replays = []
    for value in (5, 6):
        seed.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        replays.append(copied(outcome))
        assert_same_bits(replays[-1], run(case.kernel, case.with_options(seed=value), inputs, upstream))
    name = case.row.results[-1]
    assert not torch.equal(replays[0].results[name], replays[1].results[name])


@pytest.mark.parametrize("case", DROPOUT, ids=str)
def test_cuda_graph_without_a_seed_draws_new_masks(case: Case):
    graph, outcome = capture(case.with_options(seed=None), leaves(case.inputs(FLOAT32)), case.upstream(FLOAT32))
    replays = []
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        replays.append(outcome.results[case.row.results[-1]].clone())
    assert not torch.equal(*replays)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_operator_on_another_stream(case: Case):
    """The inputs are written late on that stream: work on any other stream would read the old values."""
    values, upstream = case.inputs(FLOAT32), case.upstream(FLOAT32)
    run(case.kernel, case, values, upstream)  # compiles the kernels
    buffers = {name: None if t is None else _poison_like(t) for name, t in values.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        overwrite(buffers, values)
        outcome = forward_and_backward(case, leaves(buffers, differentiable=case.row.differentiable), upstream)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    assert_equal_to_reference(case, values, upstream, outcome)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_operator_never_synchronises(case: Case):
    inputs = leaves(case.inputs(FLOAT32), differentiable=case.row.differentiable)
    upstream = case.upstream(FLOAT32)
    forward_and_backward(case, inputs, upstream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(case, inputs, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _poison_like(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else torch.zeros_like(tensor)


@pytest.fixture
def plenty_of_memory():
    if torch.cuda.get_device_properties(DEVICE).total_memory < 100 * GIB:
        pytest.skip("needs 100 GiB of device memory")
    torch.cuda.empty_cache()
    # filling these tensors with NaN takes longer than the kernels
    torch.use_deterministic_algorithms(False)
    yield
    torch.cuda.empty_cache()


@pytest.mark.large
@pytest.mark.usefixtures("plenty_of_memory")
@pytest.mark.parametrize("case", FAR, ids=str)
def test_operator_with_more_than_2_to_the_31_elements(case: Case):
    """The last rows equal the reference on these rows alone; the upstream gradient is zero elsewhere."""
    rows, dtype = 8, torch.bfloat16

    def far_end(tensor: Tensor) -> Tensor:
        return tensor[-rows:].detach().clone()

    generator = torch.Generator(DEVICE).manual_seed(0)
    end = case.with_batch(rows)
    inputs = leaves(end.inputs(dtype), differentiable=case.row.differentiable)
    for name in case.row.batched:
        if name == "lengths":
            inputs[name] = torch.full(case.shapes[name], case.shapes["k_cache"][2], device=DEVICE)
            continue
        if name == "targets":
            inputs[name] = case.draw(name, dtype, torch.Generator().manual_seed(0))
            continue
        tensor = torch.empty(case.shapes[name], dtype=dtype, device=DEVICE)
        inputs[name] = tensor.normal_(generator=generator).requires_grad_(case.row.differentiable)
    largest = max(max(t.numel() for t in inputs.values() if t is not None), case.largest_intermediate())
    assert largest > 2**31
    upstream = end.upstream(dtype)
    results = call(case.kernel, case, inputs)
    outcome = Outcome({name: far_end(y) for name, y in results.items()}, {})
    alone = {name: far_end(t) if name in case.row.batched else t for name, t in inputs.items()}
    if not case.row.differentiable:
        assert_equal_to_reference(end, alone, upstream, outcome)
        return
    gradients = []
    for name, dy in upstream.items():
        whole = torch.zeros_like(results[name])
        whole[-rows:] = dy
        gradients.append(whole)
    torch.autograd.backward(list(results.values()), gradients)
    differentiated = {name: t for name, t in inputs.items() if t is not None and t.requires_grad}
    outcome.gradients = {
        name: far_end(t.grad) if name in case.row.batched else t.grad for name, t in differentiated.items()
    }
    assert_equal_to_reference(end, alone, upstream, outcome)
    for name in set(case.row.batched) & set(differentiated):
        assert not inputs[name].grad[:rows].any(), f"gradient of {name}: not zero where none arrives"
