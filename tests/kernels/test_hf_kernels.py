"""Hugging Face's package, also called `kernels`, behind this one: its names and modules are there too."""

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


def test_names_of_both(tmp_path):
    code = f"""
import kernels, sys
from kernels import norm, reference_cpu
kernels.layer_norm
assert "kernels._hugging_face" not in sys.modules, "theirs runs when it is asked for"
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
def test_their_modules_come_first_or_late(tmp_path, first: str):
    code = f"{first}\nimport kernels\nprint(kernels.get_kernel.__name__, kernels.layer_norm.__name__)"
    assert run(code, ROOT, hugging_face(tmp_path)) == "get_kernel layer_norm"


def test_names_of_neither(tmp_path):
    code = """
import kernels, sys
print(hasattr(kernels, "__wrapped__"), "kernels._hugging_face" in sys.modules, hasattr(kernels, "nothing"))
"""
    assert run(code, ROOT, hugging_face(tmp_path)) == "False False False"


def test_their_errors_are_theirs(tmp_path):
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


def test_nothing_of_theirs_where_it_is_not_installed(tmp_path):
    """A folder called `kernels` alone is not theirs."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("get_kernel = loaded = 1")
    code = (
        "import kernels; print(hasattr(kernels, 'get_kernel'), hasattr(kernels, '__version__'), len(kernels.__path__))"
    )
    assert run(code, ROOT, tmp_path) == "False False 1"


def test_metadata_without_a_package(tmp_path):
    shutil.rmtree(hugging_face(tmp_path) / "kernels")
    assert (
        run("import kernels; print(hasattr(kernels, 'get_kernel'), len(kernels.__path__))", ROOT, tmp_path) == "False 1"
    )


def over_theirs(folder: Path) -> Path:
    """This package, installed over Hugging Face's."""
    hugging_face(folder)
    shutil.copytree(ROOT / "kernels", folder / "kernels", dirs_exist_ok=True)
    return folder


def test_installed_over_theirs(tmp_path):
    code = """
import kernels
print(kernels.layer_norm.__name__, len(kernels.__path__), hasattr(kernels, "__wrapped__"))
from kernels import get_kernel
"""
    done = python(code, over_theirs(tmp_path))
    assert done.stdout.split() == ["layer_norm", "1", "False"]
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ImportError: {hf_kernels.overwritten('0.18.2')}".replace(
        str(ROOT), str(tmp_path)
    )


def test_what_is_not_here_names_the_operators():
    with pytest.raises(
        AttributeError, match="module 'kernels' has no attribute 'rms_norm'; its operators are add_layer"
    ):
        kernels.rms_norm  # noqa: B018
