"""Names and modules of Hugging Face's package `kernels` behind this package."""

import shutil
from pathlib import Path

import pytest

import kernels
from kernels import hf_kernels
from tests.support.namesakes import NAMES, ROOT, hugging_face, python


def run(code: str, *path: Path) -> str:
    done = python(code, *path)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_has_the_names_of_both_packages(tmp_path):
    code = f"""
import kernels, sys
from kernels import norm, reference_cpu
kernels.layer_norm
assert "kernels._hugging_face" not in sys.modules, "their __init__.py runs when one of its names is first used"
from kernels import {", ".join(NAMES)}, layer_norm, use_kernel_forward_from_hub
from kernels import reference, runtime
import kernels.layer
assert kernels.get_kernel is get_kernel is kernels.layer.get_kernel is kernels.loading.late()
assert layer_norm.__module__.startswith("kernels.")
print(kernels.__version__, kernels.loaded, kernels.layer.__file__, kernels.__file__)
"""
    version, loaded, theirs, ours = run(code, ROOT, hugging_face(tmp_path)).split()
    assert (version, loaded) == ("0.18.2", "theirs")
    assert Path(theirs) == tmp_path / "kernels/layer/__init__.py"
    assert Path(ours) == ROOT / "kernels/__init__.py"


@pytest.mark.parametrize("first", ["import kernels.layer", "from kernels.loading import late; late()"])
def test_their_modules_import_before_and_after_ours(tmp_path, first: str):
    code = f"{first}\nimport kernels\nprint(kernels.get_kernel.__name__, kernels.layer_norm.__name__)"
    assert run(code, ROOT, hugging_face(tmp_path)) == "get_kernel layer_norm"


def test_names_of_neither_package_run_nothing(tmp_path):
    code = """
import kernels, sys
print(hasattr(kernels, "__wrapped__"), "kernels._hugging_face" in sys.modules, hasattr(kernels, "nothing"))
"""
    assert run(code, ROOT, hugging_face(tmp_path)) == "False False False"


def test_their_errors_propagate(tmp_path):
    (hugging_face(tmp_path) / "kernels/loading.py").write_text("raise RuntimeError('no hub')")
    code = """
import kernels, sys
for _ in range(2):
    try:
        kernels.get_kernel
    except RuntimeError as error:
        print(error, "kernels._hugging_face" in sys.modules)
"""
    assert run(code, ROOT, tmp_path).splitlines() == ["no hub False"] * 2


def test_a_folder_without_their_metadata_is_ignored(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("get_kernel = loaded = 1")
    code = (
        "import kernels; print(hasattr(kernels, 'get_kernel'), hasattr(kernels, '__version__'), len(kernels.__path__))"
    )
    assert run(code, ROOT, tmp_path) == "False False 1"


def test_their_metadata_without_a_package_is_ignored(tmp_path):
    shutil.rmtree(hugging_face(tmp_path) / "kernels")
    assert (
        run("import kernels; print(hasattr(kernels, 'get_kernel'), len(kernels.__path__))", ROOT, tmp_path) == "False 1"
    )


def test_their_names_raise_where_ours_is_installed_over_theirs(tmp_path):
    shutil.copytree(ROOT / "kernels", hugging_face(tmp_path) / "kernels", dirs_exist_ok=True)
    code = """
import kernels
print(kernels.layer_norm.__name__, len(kernels.__path__), hasattr(kernels, "__wrapped__"))
from kernels import get_kernel
"""
    done = python(code, tmp_path)
    assert done.stdout.split() == ["layer_norm", "1", "False"]
    assert done.returncode == 1
    expected = hf_kernels.overwritten("0.18.2").replace(str(ROOT), str(tmp_path))
    assert done.stderr.splitlines()[-1] == f"ImportError: {expected}"


def test_a_missing_name_raises_with_the_operators():
    with pytest.raises(AttributeError, match=r"'rms_norm'.* add_layer_norm, causal_attention"):
        kernels.rms_norm  # noqa: B018
