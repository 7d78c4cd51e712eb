"""Every operator against the reference in float64, and the promises that all of them make."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from operators import CASES, SMALL, Case
from oracle import DEVICE, assert_equal_to_oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def leaves(inputs: dict[str, Tensor | None], dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    """Copies that gather gradients, in another dtype where one is given. Strides are kept."""
    return {
        name: None if tensor is None else tensor.detach().to(dtype or tensor.dtype).requires_grad_()
        for name, tensor in inputs.items()
    }


def gradients(inputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: tensor.grad for name, tensor in inputs.items() if tensor is not None}


def run(function, inputs: dict[str, Tensor | None], case: Case, dy: Tensor | None = None) -> Tensor:
    """The result of one forward and, with an upstream gradient, backward into `inputs`."""
    y = function(**inputs, **case.options)
    if dy is not None:
        y.backward(dy.to(y.dtype))
    return y.detach()


def upstream(case: Case, dtype: torch.dtype) -> Tensor:
    shape = next(iter(case.inputs(dtype).values())).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward_equal_the_reference(case: Case, dtype: torch.dtype):
    inputs, dy = case.inputs(dtype), upstream(case, dtype)
    ours, theirs, exact = leaves(inputs), leaves(inputs), leaves(inputs, torch.float64)
    y = run(case.kernel, ours, case, dy)
    same_dtype = run(case.reference, theirs, case, dy)
    oracle = run(case.reference, exact, case, dy)
    assert_equal_to_oracle("result", y, same_dtype, oracle)
    for name, gradient in gradients(ours).items():
        assert_equal_to_oracle(f"gradient of {name}", gradient, gradients(theirs)[name], gradients(exact)[name])


def restride(tensor: Tensor, how: str) -> Tensor:
    """The same values at other strides or another storage offset."""
    if how == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "outer dimensions swapped" and tensor.dim() >= 3:
        return tensor.transpose(0, -2).contiguous().transpose(0, -2)
    if how == "every second element":
        return tensor.repeat_interleave(2, dim=-1)[..., ::2]
    if how == "offset by one element":
        return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape)
    return tensor


@pytest.mark.parametrize(
    "how", ["transposed", "outer dimensions swapped", "every second element", "offset by one element"]
)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_strides_and_offsets_do_not_matter(case: Case, how: str):
    inputs, dy = case.inputs(torch.float32), upstream(case, torch.float32)
    restrided = {name: None if t is None else restride(t, how) for name, t in inputs.items()}
    plain, strided = leaves(inputs), leaves(restrided)
    y = run(case.kernel, plain, case, dy)
    assert torch.equal(run(case.kernel, strided, case, restride(dy, how)), y)
    for name, gradient in gradients(plain).items():
        # products read other strides in another order, so only the kernels' own results keep their bits
        torch.testing.assert_close(gradients(strided)[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_expanded_inputs_and_expanded_upstream_gradients(case: Case):
    """Zero strides: an input that repeats one row, and the gradient that `sum()` sends back."""
    inputs = case.inputs(torch.float32)
    first = next(iter(inputs))
    inputs[first] = inputs[first][..., :1, :].expand_as(inputs[first])
    ours, theirs = leaves(inputs), leaves(inputs)
    case.kernel(**ours, **case.options).sum().backward()
    case.reference(**theirs, **case.options).sum().backward()
    for name, gradient in gradients(ours).items():
        torch.testing.assert_close(gradient, gradients(theirs)[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_run_gives_the_same_bits(case: Case):
    dy = upstream(case, torch.float32)
    runs = [leaves(case.inputs(torch.float32)) for _ in range(2)]
    first, second = (run(case.kernel, inputs, case, dy) for inputs in runs)
    assert torch.equal(first, second)
    for name, gradient in gradients(runs[0]).items():
        assert torch.equal(gradient, gradients(runs[1])[name]), name


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_only_the_gradients_asked_for_are_computed(case: Case):
    """One input at a time requires a gradient; it is the one that all together give."""
    dy = upstream(case, torch.float32)
    together = leaves(case.inputs(torch.float32))
    run(case.kernel, together, case, dy)
    for name in case.shapes:
        alone = case.inputs(torch.float32)
        alone[name].requires_grad_()
        run(case.kernel, alone, case, dy)
        assert torch.equal(alone[name].grad, together[name].grad)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_registration(case: Case):
    """PyTorch's own check of schema, fake implementation and autograd, for the forward as it is called."""
    recorded = record_operator_calls(case)
    assert {call[0] for call in recorded} == {
        getattr(torch.ops.gptfast, case.operator).default,
        getattr(torch.ops.gptfast, f"{case.operator}_backward").default,
    }
    for operator, arguments in recorded:
        backward = operator.name().endswith("_backward")
        # the backward has no derivative by design, so it is not asked for one
        tests = ("test_schema", "test_faketensor") if backward else torch.library.opcheck.__kwdefaults__["test_utils"]
        torch.library.opcheck(operator, arguments, test_utils=tests)


def record_operator_calls(case: Case) -> list[tuple]:
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "gptfast":
                calls.append((function, tuple(a.detach() if isinstance(a, Tensor) else a for a in args)))
            return function(*args, **(kwargs or {}))

    with Recorder():
        run(case.kernel, leaves(case.inputs(torch.float32)), case, upstream(case, torch.float32))
    return [
        (f, tuple(a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args))
        if not f.name().endswith("_backward")
        else (f, args)
        for f, args in calls
    ]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_compiles_into_one_graph(case: Case, dynamic: bool):
    dy = upstream(case, torch.float32)
    plain, compiled = leaves(case.inputs(torch.float32)), leaves(case.inputs(torch.float32))
    y = run(case.kernel, plain, case, dy)
    function = torch.compile(case.kernel, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert torch.equal(run(function, compiled, case, dy), y)
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradients(compiled)[name], gradient), name


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_autocast_gives_the_dtype_of_the_reference(case: Case):
    inputs = leaves(case.inputs(torch.float32))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = case.kernel(**inputs, **case.options)
        expected = case.reference(**inputs, **case.options)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
    y.sum().backward()
    assert all(gradient.dtype == torch.float32 for gradient in gradients(inputs).values())


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_shapes_without_data(case: Case):
    """Meta and fake tensors get the shape, dtype and strides of a real result, forward and backward."""
    real = leaves(case.inputs(torch.bfloat16))
    y = case.kernel(**real, **case.options)
    meta = leaves({name: t.to("meta") for name, t in real.items()})
    with FakeTensorMode():
        fake = {name: torch.empty(t.shape, dtype=t.dtype, device=DEVICE) for name, t in real.items()}
        from_fake = case.kernel(**fake, **case.options)
    from_meta = case.kernel(**meta, **case.options)
    for result in (from_meta, from_fake):
        assert (result.shape, result.dtype, result.stride()) == (y.shape, y.dtype, y.stride())
    from_meta.sum().backward()
    assert all(meta[name].grad.shape == real[name].shape for name in real)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_second_derivative_is_refused(case: Case):
    inputs = leaves(case.inputs(torch.float32))
    first = next(iter(inputs.values()))
    y = case.kernel(**inputs, **case.options)
    (gradient,) = torch.autograd.grad((y * y).sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.sum().backward()


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_float64_is_refused_with_a_way_out(case: Case):
    with pytest.raises(
        TypeError, match=f"float32, float16 or bfloat16, got torch.float64; kernels.reference.{case.operator}"
    ):
        case.kernel(**case.inputs(torch.float64), **case.options)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_device_that_is_not_the_current_one(case: Case):
    here, there = case.inputs(torch.float32), case.inputs(torch.float32)
    there = {name: t.to("cuda:1") for name, t in there.items()}
    assert torch.equal(case.kernel(**there, **case.options).cpu(), case.kernel(**here, **case.options).cpu())
