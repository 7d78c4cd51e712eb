"""Every operator against the reference in float64, and the promises that all of them make."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kernels import tuning
from tests.support.cases import DTYPES, Case
from tests.support.layouts import LAYOUTS, Layout, layouts
from tests.support.operators import CASES, DIFFERENTIABLE, OPERATORS, SMALL
from tests.support.oracle import DEVICE
from tests.support.running import assert_equal_to_reference, assert_same_bits, backward, call, leaves, run

LARGE = [case for operator in OPERATORS.values() for case in operator.large]
FLOAT32 = torch.float32


def in_every_dtype(cases: list[Case]) -> list:
    return [pytest.param(case, dtype, id=f"{case}-{dtype}") for case in cases for dtype in case.dtypes()]


@pytest.mark.parametrize(("case", "dtype"), in_every_dtype(CASES))
def test_forward_and_backward_equal_the_reference(case: Case, dtype: torch.dtype):
    assert_equal_to_reference(case, case.inputs(dtype), case.upstream(dtype))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the interpreter would take minutes; needs a CUDA device")
@pytest.mark.parametrize(("case", "dtype"), in_every_dtype(LARGE))
def test_real_sizes_equal_the_reference(case: Case, dtype: torch.dtype):
    assert_equal_to_reference(case, case.inputs(dtype), case.upstream(dtype))


@pytest.mark.parametrize(
    ("case", "used"),
    [pytest.param(c, used, id=f"{c}-only-{used[0]}") for c in CASES for used in c.row.uses if used != c.row.results],
)
def test_only_one_of_the_results_is_used(case: Case, used: tuple[str, ...]):
    """Its gradient arrives alone; where nothing depends on an argument, that one's is none or zero."""
    dtype = case.dtypes()[0]
    assert_equal_to_reference(case, case.inputs(dtype), case.upstream(dtype, used))


@pytest.mark.parametrize(
    ("case", "configuration"),
    [
        pytest.param(case, configuration, id=f"{case}-{name}")
        for case in SMALL
        for name, configuration in case.row.configurations.items()
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_launch_configuration_is_right(case: Case, configuration: dict, dtype: torch.dtype):
    with tuning.forced(configuration):
        assert_equal_to_reference(case, case.inputs(dtype), case.upstream(dtype))


@pytest.mark.parametrize("index", range(1, 4))
@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_candidate_of_tuning_is_right(case: Case, index: int, dtype: torch.dtype):
    with tuning.candidate(index):
        assert_equal_to_reference(case, case.inputs(dtype), case.upstream(dtype))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_strides_and_offsets_do_not_matter(case: Case, layout: Callable[[int], Layout]):
    """One layout for all inputs and upstream gradients."""

    def lay_out(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        return {n: None if t is None else layout(t.dim()).apply(t) for n, t in tensors.items()}

    upstream = lay_out(case.upstream(FLOAT32))
    assert_equal_to_reference(case, lay_out(case.inputs(FLOAT32)), upstream, magnitude=4.0)


@pytest.mark.parametrize("name", OPERATORS)
@settings(derandomize=True, max_examples=15, deadline=None, database=None, phases=[Phase.generate], print_blob=False)
@given(data=st.data())
def test_shapes_strides_and_offsets_as_they_come(name: str, data: st.DataObject):
    """Transposed, repeated by zero strides, with gaps, and off the alignment: inputs and upstream gradients."""
    operator = OPERATORS[name]
    case = data.draw(operator.drawn)
    dtype = data.draw(st.sampled_from(case.dtypes()))

    def lay_out(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        return {n: None if t is None else data.draw(layouts(t.dim()), n).apply(t) for n, t in tensors.items()}

    upstream = lay_out(case.upstream(dtype, data.draw(st.sampled_from(operator.uses))))
    # equal keys and constant rows have gradients that cancel to zero: those are as good as what was subtracted
    assert_equal_to_reference(case, lay_out(case.inputs(dtype)), upstream, magnitude=4.0)


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_the_gradient_that_a_sum_sends_back(case: Case):
    """One number, expanded over the result by zero strides."""
    upstream = {name: torch.ones((), device=DEVICE).expand_as(dy) for name, dy in case.upstream(FLOAT32).items()}
    assert_equal_to_reference(case, case.inputs(FLOAT32), upstream)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_run_gives_the_same_bits(case: Case):
    inputs, upstream = case.inputs(FLOAT32), case.upstream(FLOAT32)
    first, second = (run(case.kernel, case, inputs, upstream) for _ in range(2))
    assert_same_bits(second, first)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_inputs_and_upstream_gradients_are_left_alone(case: Case):
    inputs, upstream = case.inputs(FLOAT32), case.upstream(FLOAT32)
    run(case.kernel, case, inputs, upstream)
    for tensors, drawn in ((inputs, case.inputs(FLOAT32)), (upstream, case.upstream(FLOAT32))):
        assert all(tensor is None or torch.equal(tensor, drawn[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_one_gradient_alone_is_the_one_that_all_together_give(case: Case):
    """One input at a time requires a gradient."""
    upstream = case.upstream(FLOAT32)
    together = run(case.kernel, case, case.inputs(FLOAT32), upstream)
    for name, gradient in together.gradients.items():
        alone = case.inputs(FLOAT32)
        alone[name].requires_grad_()
        backward(call(case.kernel, case, alone), upstream)
        assert torch.equal(alone[name].grad, gradient), name


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_without_gradients_nothing_is_recorded(case: Case):
    results = call(case.kernel, case, case.inputs(FLOAT32))
    with torch.no_grad():
        inside = call(case.kernel, case, leaves(case.inputs(FLOAT32)))
    for name, result in results.items():
        assert not result.requires_grad
        assert not inside[name].requires_grad
        assert torch.equal(result, inside[name])


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_registration(case: Case):
    """PyTorch's own check of schema, fake implementation and autograd, for the forward as it is called."""
    recorded = record_operator_calls(case)
    names = [case.operator] + [f"{case.operator}_backward"] * case.row.differentiable
    assert {call[0] for call in recorded} == {getattr(torch.ops.gptfast, name).default for name in names}
    for operator, arguments in recorded:
        backward = operator.name().endswith("_backward")
        # what has no derivative by design is not asked for one
        plain = backward or not case.row.differentiable
        tests = ("test_schema", "test_faketensor") if plain else torch.library.opcheck.__kwdefaults__["test_utils"]
        torch.library.opcheck(operator, arguments, test_utils=tests)


def record_operator_calls(case: Case) -> list[tuple]:
    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "gptfast":
                calls.append((function, tuple(a.detach() if isinstance(a, Tensor) else a for a in args)))
            return function(*args, **(kwargs or {}))

    with Recorder():
        run(case.kernel, case, case.inputs(FLOAT32), case.upstream(FLOAT32))
    return [
        (f, tuple(a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args))
        if not f.name().endswith("_backward")
        else (f, args)
        for f, args in calls
    ]


@pytest.fixture
def empty_compile_cache():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("empty_compile_cache")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_compiles_into_one_graph(case: Case, dynamic: bool):
    """The same bits; a batch that repeats compiles nothing, another number of rows once more at most."""
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.kernel, fullgraph=True, dynamic=dynamic, backend=graphs)

    def compare(case: Case) -> int:
        inputs, upstream = case.inputs(FLOAT32), case.upstream(FLOAT32)
        assert_same_bits(run(compiled, case, inputs, upstream), run(case.kernel, case, inputs, upstream))
        return graphs.frame_count

    first = compare(case)  # two where a float argument turns out to be a constant
    assert compare(case) == first
    if dynamic:
        assert [compare(case.with_batch(size)) for size in (5, 3)][-1] <= first + 1


@pytest.mark.slow
@pytest.mark.usefixtures("empty_compile_cache")
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_compiles_with_inductor(case: Case):
    inputs, upstream = case.inputs(FLOAT32), case.upstream(FLOAT32)
    outcome = run(torch.compile(case.kernel, fullgraph=True), case, inputs, upstream)
    assert_equal_to_reference(case, inputs, upstream, outcome)


class Calling(torch.nn.Module):
    def __init__(self, case: Case):
        super().__init__()
        self.case = case

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return call(self.case.kernel, self.case, inputs)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_exports(case: Case):
    inputs = case.inputs(FLOAT32)
    program = torch.export.export(Calling(case), (inputs,))
    assert getattr(torch.ops.gptfast, case.operator).default in {node.target for node in program.graph.nodes}
    exported, expected = program.module()(inputs), call(case.kernel, case, inputs)
    assert all(torch.equal(exported[name], result) for name, result in expected.items())


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_activation_checkpointing_gives_the_same_bits(case: Case):
    """The forward runs a second time in the backward, and draws the same dropout: by a seed, or by PyTorch's own."""
    cases = [case]
    if case.has_dropout:
        cases = [case.with_options(seed=seed) for seed in (torch.tensor([5], device=DEVICE), 5, None)]
    for one in cases:
        forwards = 0

        def checkpointed(one=one, **arguments):
            def forward(arguments):
                nonlocal forwards
                forwards += 1
                return one.kernel(**arguments)

            return checkpoint(forward, arguments, use_reentrant=False)

        inputs, upstream = one.inputs(FLOAT32), one.upstream(FLOAT32)
        torch.manual_seed(3)
        outcome = run(checkpointed, one, inputs, upstream)
        torch.manual_seed(3)
        assert_same_bits(outcome, run(one.kernel, one, inputs, upstream))
        assert forwards == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_autocast_gives_the_dtype_of_the_reference(case: Case, dtype: torch.dtype):
    inputs = leaves(case.inputs(dtype), differentiable=case.row.differentiable)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        results, expected = (call(function, case, inputs) for function in (case.kernel, case.reference))
    for name, result in results.items():
        # a sum that is normalised in float32 is kept in float32, where PyTorch's is as narrow as its terms
        widened = DEVICE.type == "cuda" and name == "h"
        assert result.dtype == (torch.float32 if widened else expected[name].dtype)
        torch.testing.assert_close(result, expected[name], rtol=0.05, atol=0.05, check_dtype=False)
    if not case.row.differentiable:
        return
    backward(results, case.upstream(dtype))
    differentiated = [tensor for tensor in inputs.values() if tensor is not None and tensor.requires_grad]
    assert all(tensor.grad.dtype == tensor.dtype for tensor in differentiated)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_shapes_without_data(case: Case):
    """Meta and fake tensors get the shape, dtype and strides of a real result, forward and backward."""
    inputs = case.inputs(torch.bfloat16)
    real = run(case.kernel, case, inputs, case.upstream(torch.bfloat16))
    meta_inputs = {name: None if t is None else t.to("meta") for name, t in inputs.items()}
    meta_upstream = {name: t.to("meta") for name, t in case.upstream(torch.bfloat16).items()}
    from_meta = run(case.kernel, case, meta_inputs, meta_upstream)
    with FakeTensorMode() as mode:
        fake_inputs = {name: None if t is None else mode.from_tensor(t) for name, t in inputs.items()}
        fake_upstream = {name: mode.from_tensor(t) for name, t in case.upstream(torch.bfloat16).items()}
        from_fake = run(case.kernel, case, fake_inputs, fake_upstream)
    for outcome in (from_meta, from_fake):
        for kind in ("results", "gradients"):
            for name, tensor in getattr(real, kind).items():
                other = getattr(outcome, kind)[name]
                assert (other.shape, other.dtype) == (tensor.shape, tensor.dtype), f"{kind}: {name}"
                # of an attention's gradients autograd itself makes copies in other strides
                assert kind == "gradients" or other.stride() == tensor.stride(), f"{kind}: {name}"


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_second_derivative_is_refused(case: Case):
    inputs = leaves(case.inputs(FLOAT32))
    first = next(iter(inputs.values()))
    results = call(case.kernel, case, inputs).values()
    (gradient,) = torch.autograd.grad(sum((y * y).sum() for y in results), first, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.sum().backward()


@pytest.mark.parametrize("case", [case for case in SMALL if not case.row.differentiable], ids=str)
def test_a_derivative_is_refused_where_there_is_none(case: Case):
    with pytest.raises((RuntimeError, ValueError), match=r"no autograd formula was registered|are for inference"):
        next(iter(call(case.kernel, case, leaves(case.inputs(FLOAT32))).values())).sum().backward()


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_float64_is_refused_with_a_way_out(case: Case):
    with pytest.raises(
        TypeError, match=f"float32, float16 or bfloat16, got torch.float64; kernels.reference.{case.operator}"
    ):
        case.kernel(**case.inputs(torch.float64), **case.options)


def test_every_operator_is_in_the_table():
    import kernels

    assert set(OPERATORS) == set(kernels.__all__) - {"quantize_int8", "reference", "warmup"}
    assert {dtype for case in CASES for dtype in case.dtypes()} == set(DTYPES)
