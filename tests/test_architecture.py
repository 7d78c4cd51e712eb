"""The floors of the house: a module imports only from floors below its own, and no imports form a circle.

`FLOORS` is the architecture, from the top to the bottom. Modules of one entry share a floor and may import each other
as long as no circle arises. Imports under `TYPE_CHECKING` and inside functions count as well.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# from the top; a name covers a module or a whole package, and a longer name goes before a shorter one
FLOORS = [
    "benchmarks.documents",
    "benchmarks",  # suites and commands
    "benchmarks.operators",
    "benchmarks.reporting",
    "benchmarks.measuring",
    "benchmarks.cost_model benchmarks.__init__",
    "gptfast.__main__ gptfast.cli",
    "gptfast.commands",
    "gptfast.__init__",
    "gptfast.training",
    "gptfast.load_model",
    "gptfast.evaluation",
    "gptfast.model",
    "gptfast.generation",
    "gptfast.huggingface gptfast.data",
    "gptfast.checkpoint",
    "gptfast.quantization gptfast.flops",
    "gptfast.lora gptfast.optim gptfast.distributed gptfast.backend gptfast.hardware gptfast.devices"
    " gptfast.cuda_graphs gptfast.tokenizers",
    "gptfast.config gptfast.import_guard",
    "kernels.__init__ kernels.codegen",
    "kernels.precompile kernels.operators",
    "kernels",  # the operators
    "kernels.reference_cpu kernels.onednn",
    "kernels.reference",
    "kernels.checks kernels.workload",
    "kernels.runtime kernels.tuning kernels.targets",
    "kernels.tile kernels.tma kernels.philox kernels.pytorch_internals kernels.hf_kernels",
]


def modules() -> dict[str, Path]:
    """Dotted name to file; a package is its `__init__`."""
    paths = [path for folder in ("benchmarks", "gptfast", "kernels") for path in (ROOT / folder).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def imported(name: str, path: Path, known: set[str]) -> set[str]:
    """Modules of the project that the file imports, at any depth of the code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {target for dotted in found if (target := resolve(dotted, known))} - {name}


def resolve(dotted: str, known: set[str]) -> str | None:
    """The module that defines `dotted`: itself, its package's `__init__`, or the module that has it as an attribute."""
    for candidate in (dotted, f"{dotted}.__init__", dotted.rpartition(".")[0], f"{dotted.rpartition('.')[0]}.__init__"):
        if candidate in known:
            return candidate
    return None


def imports() -> dict[str, set[str]]:
    paths = modules()
    return {name: imported(name, path, set(paths)) for name, path in paths.items()}


def floor(module: str) -> int:
    """Index in `FLOORS`; the longest matching name decides."""
    matches = [
        (len(name), index)
        for index, names in enumerate(FLOORS)
        for name in names.split()
        if module == name or module.startswith(f"{name}.")
    ]
    assert matches, f"{module} has no floor: add it to FLOORS"
    return max(matches)[1]


def upward(edges: dict[str, set[str]]) -> list[str]:
    return sorted(
        f"{importer} imports {target}, which is above it"
        for importer, targets in edges.items()
        for target in targets
        if floor(target) < floor(importer)
    )


def test_no_import_points_up():
    assert upward(imports()) == []


def test_no_imports_form_a_circle():
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        pytest.fail("an import circle: " + " -> ".join(error.args[1]))


def test_an_import_that_points_up_is_found():
    found = upward({"kernels.norm": {"gptfast.model"}, "gptfast.model": {"kernels.norm"}})
    assert found == ["kernels.norm imports gptfast.model, which is above it"]


def test_imports_inside_functions_and_under_type_checking_count(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("if TYPE_CHECKING:\n    from gptfast.model import GPT\ndef f():\n    from kernels import norm\n")
    known = {"gptfast.model", "kernels.norm", "kernels.__init__"}
    assert imported("a", path, known) == {"gptfast.model", "kernels.norm"}
