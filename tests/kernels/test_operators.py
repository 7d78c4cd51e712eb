"""Tests of every operator in the table: equality with the reference in float64, and the properties that all share."""

from __future__ import annotations

import inspect
import re
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

import kernels
from kernels import reference, reference_cpu, tuning
from tests.support.cases import DTYPES, OPERATORS, Case, Operator
from tests.support.layouts import LAYOUTS, Layout, layouts
from tests.support.operators import CASES, DIFFERENTIABLE, SMALL, attention, decode, packed
from tests.support.oracle import DEVICE
from tests.support.running import assert_equal_to_reference, assert_same_bits, backward, call, leaves, run

# the interpreter would take minutes for real sizes
LARGE = [case for operator in OPERATORS.values() for case in operator.large] if DEVICE.type == "cuda" else []
FLOAT32 = torch.float32
NAMESPACES = (kernels, reference, reference_cpu)


def in_every_dtype(cases: list[Case]) -> list:
    return [pytest.param(case, dtype, id=f"{case}-{dtype}") for case in cases for dtype in case.dtypes()]


@pytest.mark.parametrize(("case", "dtype"), in_every_dtype(CASES + LARGE))
def test_operator_equals_the_reference(case: Case, dtype: torch.dtype):
    assert_equal_to_reference(case, case.inputs(dtype), case.upstream(dtype))


@pytest.mark.parametrize(
    ("case", "used"),
    [pytest.param(c, used, id=f"{c}-only-{used[0]}") for c in CASES for used in c.row.uses if used != c.row.results],
)
def test_operator_equals_the_reference_if_one_result_is_used(case: Case, used: tuple[str, ...]):
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
def test_launch_configuration_equals_the_reference(case: Case, configuration: dict, dtype: torch.dtype):
    with tuning.forced(configuration):
        assert_equal_to_reference(case, case.inputs(dtype), case.upstream(dtype))


@pytest.mark.parametrize("index", range(1, 4))
@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tuning_candidate_equals_the_reference(case: Case, index: int, dtype: torch.dtype):
    with tuning.candidate(index):
        assert_equal_to_reference(case, case.inputs(dtype), case.upstream(dtype))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_operator_with_one_layout_for_all_tensors_equals_the_reference(case: Case, layout: Callable[[int], Layout]):
    inputs, upstream = (
        {name: None if t is None else layout(t.dim()).apply(t) for name, t in tensors.items()}
        for tensors in (case.inputs(FLOAT32), case.upstream(FLOAT32))
    )
    assert_equal_to_reference(case, inputs, upstream, magnitude=4.0)


@pytest.mark.parametrize("name", OPERATORS)
@settings(derandomize=True, max_examples=15, deadline=None, database=None, phases=[Phase.generate], print_blob=False)
@given(data=st.data())
def test_operator_with_random_shapes_and_layouts_equals_the_reference(name: str, data: st.DataObject):
    """Tensors are transposed, expanded, spaced and misaligned at random."""
    operator = OPERATORS[name]
    case = data.draw(operator.drawn)
    dtype = data.draw(st.sampled_from(case.dtypes()))

    def lay_out(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        return {n: None if t is None else data.draw(layouts(t.dim()), n).apply(t) for n, t in tensors.items()}

    upstream = lay_out(case.upstream(dtype, data.draw(st.sampled_from(operator.uses))))
    # with equal keys or constant rows, gradients cancel to zero: their error is that of the terms
    assert_equal_to_reference(case, lay_out(case.inputs(dtype)), upstream, magnitude=4.0)


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_operator_equals_the_reference_with_the_expanded_gradient_of_a_sum(case: Case):
    upstream = {name: torch.ones((), device=DEVICE).expand_as(dy) for name, dy in case.upstream(FLOAT32).items()}
    assert_equal_to_reference(case, case.inputs(FLOAT32), upstream)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_operator_gives_the_same_bits_on_every_run(case: Case):
    inputs, upstream = case.inputs(FLOAT32), case.upstream(FLOAT32)
    first, second = (run(case.kernel, case, inputs, upstream) for _ in range(2))
    assert_same_bits(second, first)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_operator_does_not_write_to_its_inputs(case: Case):
    inputs, upstream = case.inputs(FLOAT32), case.upstream(FLOAT32)
    run(case.kernel, case, inputs, upstream)
    for tensors, drawn in ((inputs, case.inputs(FLOAT32)), (upstream, case.upstream(FLOAT32))):
        assert all(tensor is None or torch.equal(tensor, drawn[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_gradient_of_one_input_is_the_same_alone_as_with_the_others(case: Case):
    upstream = case.upstream(FLOAT32)
    together = run(case.kernel, case, case.inputs(FLOAT32), upstream)
    for name, gradient in together.gradients.items():
        alone = case.inputs(FLOAT32)
        alone[name].requires_grad_()
        backward(call(case.kernel, case, alone), upstream)
        assert torch.equal(alone[name].grad, gradient), name


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_operator_without_gradients_records_nothing(case: Case):
    results = call(case.kernel, case, case.inputs(FLOAT32))
    with torch.no_grad():
        inside = call(case.kernel, case, leaves(case.inputs(FLOAT32)))
    for name, result in results.items():
        assert not result.requires_grad
        assert not inside[name].requires_grad
        assert torch.equal(result, inside[name])


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_registration_passes_opcheck(case: Case):
    """Schema, fake implementation and autograd of the forward and the backward, as they are called."""
    recorded = record_operator_calls(case)
    names = [case.operator] + [f"{case.operator}_backward"] * case.row.differentiable
    assert {call[0] for call in recorded} == {getattr(torch.ops.gptfast, name).default for name in names}
    for operator, arguments in recorded:
        backward = operator.name().endswith("_backward")
        # opcheck's further tests need a derivative
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
def test_operator_compiles_into_one_graph(case: Case, dynamic: bool):
    """Bits stay the same. The same shape compiles nothing more, other batch sizes one more graph at most."""
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.kernel, fullgraph=True, dynamic=dynamic, backend=graphs)

    def compare(case: Case) -> int:
        inputs, upstream = case.inputs(FLOAT32), case.upstream(FLOAT32)
        assert_same_bits(run(compiled, case, inputs, upstream), run(case.kernel, case, inputs, upstream))
        return graphs.frame_count

    first = compare(case)  # two graphs if a float argument becomes a constant
    assert compare(case) == first
    if dynamic:
        assert [compare(case.with_batch(size)) for size in (5, 3)][-1] <= first + 1


@pytest.mark.slow
@pytest.mark.usefixtures("empty_compile_cache")
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_operator_compiled_by_inductor_equals_the_reference(case: Case):
    inputs, upstream = case.inputs(FLOAT32), case.upstream(FLOAT32)
    outcome = run(torch.compile(case.kernel, fullgraph=True), case, inputs, upstream)
    assert_equal_to_reference(case, inputs, upstream, outcome)


class OperatorModule(torch.nn.Module):
    def __init__(self, case: Case):
        super().__init__()
        self.case = case

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return call(self.case.kernel, self.case, inputs)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_operator_exports(case: Case):
    inputs = case.inputs(FLOAT32)
    program = torch.export.export(OperatorModule(case), (inputs,))
    assert getattr(torch.ops.gptfast, case.operator).default in {node.target for node in program.graph.nodes}
    exported, expected = program.module()(inputs), call(case.kernel, case, inputs)
    assert all(torch.equal(exported[name], result) for name, result in expected.items())


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_activation_checkpointing_gives_the_same_bits(case: Case):
    """The backward recomputes the forward with the same dropout, from a seed or from PyTorch's generator."""
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
def test_autocast_gives_the_dtypes_of_the_reference(case: Case, dtype: torch.dtype):
    inputs = leaves(case.inputs(dtype), differentiable=case.row.differentiable)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        results, expected = (call(function, case, inputs) for function in (case.kernel, case.reference))
    for name, result in results.items():
        # the Triton sum stays in float32 for the norm, PyTorch's has the dtype of its terms
        widened = DEVICE.type == "cuda" and name == "h"
        assert result.dtype == (torch.float32 if widened else expected[name].dtype)
        torch.testing.assert_close(result, expected[name], rtol=0.05, atol=0.05, check_dtype=False)
    if not case.row.differentiable:
        return
    backward(results, case.upstream(dtype))
    differentiated = [tensor for tensor in inputs.values() if tensor is not None and tensor.requires_grad]
    assert all(tensor.grad.dtype == tensor.dtype for tensor in differentiated)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_meta_and_fake_tensors_have_the_shapes_dtypes_and_strides_of_real_ones(case: Case):
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
                # autograd copies an attention's gradients to other strides
                assert kind == "gradients" or other.stride() == tensor.stride(), f"{kind}: {name}"


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_second_derivative_raises(case: Case):
    inputs = leaves(case.inputs(FLOAT32))
    first = next(iter(inputs.values()))
    results = call(case.kernel, case, inputs).values()
    (gradient,) = torch.autograd.grad(sum((y * y).sum() for y in results), first, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


@pytest.mark.parametrize("case", [case for case in SMALL if not case.row.differentiable], ids=str)
def test_derivative_of_an_operator_without_one_raises(case: Case):
    with pytest.raises((RuntimeError, ValueError), match=r"no autograd formula|requires a gradient"):
        next(iter(call(case.kernel, case, leaves(case.inputs(FLOAT32))).values())).sum().backward()


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_float64_raises_and_names_the_reference(case: Case):
    with pytest.raises(TypeError, match=rf"torch\.float64.*kernels\.reference\.{case.operator}"):
        case.kernel(**case.inputs(torch.float64), **case.options)


@pytest.mark.parametrize("case", [attention(1, 1, 2, 2, 257), packed(1, 2, 1, 257), decode(2, 1, 5, 257)], ids=str)
def test_heads_wider_than_256_raise(case: Case):
    with pytest.raises(ValueError, match=f"{case.operator}: .*D must be at most 256, got 257"):
        case.kernel(**case.inputs(FLOAT32))


@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda namespace: namespace.__name__)
@pytest.mark.parametrize(
    ("operator", "changes", "error", "value"),
    [
        pytest.param(operator, changes, error, value, id=f"{operator.name}-{next(iter(changes))}-{value}")
        for operator in OPERATORS.values()
        for changes, error, value in operator.invalid
    ],
)
def test_invalid_argument_raises_with_its_name_and_value(namespace, operator: Operator, changes: dict, error, value):
    """The first of the changed arguments is the one that the message names."""
    with pytest.raises(error, match=rf"^{operator.name}: .*\b{next(iter(changes))}\b.*{re.escape(value)}"):
        getattr(namespace, operator.name)(**{**operator.valid, **changes})


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_namespaces_take_the_valid_arguments_by_one_signature(operator: Operator):
    functions = [getattr(namespace, operator.name) for namespace in NAMESPACES]
    assert len({str(inspect.signature(function)) for function in functions}) == 1
    for function in functions:
        function(**operator.valid)


@pytest.mark.parametrize("name", OPERATORS)
def test_docstring_has_every_argument_and_section(name: str):
    function = getattr(kernels, name)
    for entry in (*inspect.signature(function).parameters, "Args", "Returns", "Raises"):
        assert re.search(rf"^ *{entry}:", function.__doc__, re.MULTILINE), entry
    assert f"`kernels.reference.{name}`" in function.__doc__


def test_every_operator_is_in_the_table():
    assert set(OPERATORS) == set(reference.OPERATORS) == set(kernels.__all__) - {"quantize_int8", "reference", "warmup"}
    assert set(reference_cpu.__all__) == {*OPERATORS, "quantize_int8"}
    assert {dtype for case in CASES for dtype in case.dtypes()} == set(DTYPES)
