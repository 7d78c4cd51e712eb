"""Another package in the place of this project's `kernels`: one error with the way out. Behind it: everything works."""

import shutil
import subprocess
from pathlib import Path

import pytest

from gptfast import import_guard
from tests.support.namesakes import ROOT, hugging_face, python

GPT2 = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils.import_utils import is_kernels_available
model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2))
print(tuple(model(torch.zeros(1, 4, dtype=torch.int64)).logits.shape), is_kernels_available())
"""
OURS = """
import kernels, torch
from gptfast import GPT, GPTConfig
print(kernels.layer_norm(torch.ones(2, 4), torch.ones(4), None).shape[1], kernels.__file__)
"""
THEIRS = """
import kernels, transformers.integrations.hub_kernels as hub
print(hub.get_kernel_hub is kernels.get_kernel)
"""


def lines(code: str, *path: Path) -> list[str]:
    done = python(code, *path)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def error(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of what a Python that fails says."""
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "code", [OURS + GPT2 + THEIRS, GPT2 + THEIRS + OURS], ids=["gptfast first", "transformers first"]
)
def test_transformers_works_with_theirs_behind_ours(tmp_path, code: str):
    found = lines(code, ROOT, hugging_face(tmp_path))
    assert sorted(found) == ["(1, 4, 11) True", f"4 {ROOT / 'kernels/__init__.py'}", "True"]


def test_transformers_works_without_theirs():
    """It takes the version of what is called `kernels` for that of gptfast, or none, and does without."""
    assert sorted(lines(OURS + GPT2, ROOT)) == ["(1, 4, 11) False", f"4 {ROOT / 'kernels/__init__.py'}"]


def test_transformers_works_with_a_version_of_theirs_that_it_does_not_want(tmp_path):
    assert lines(GPT2, ROOT, hugging_face(tmp_path, "0.9.0")) == ["(1, 4, 11) False"]


def test_theirs_in_place_of_ours(tmp_path):
    said = error(python("import gptfast", hugging_face(tmp_path), ROOT))
    assert said == (
        f"ImportError: kernels in {tmp_path / 'kernels'} is another package than gptfast's in {ROOT / 'kernels'}, and "
        "comes first on sys.path: Hugging Face's has the same name; pip uninstall kernels, or put "
        f"{ROOT} before {tmp_path}, with which both work: PYTHONPATH={ROOT}"
    )
    assert error(python("import kernels, gptfast", tmp_path, ROOT)) == said
    assert lines("import kernels; print(kernels.loaded)", tmp_path, ROOT) == ["theirs"]


def test_it_is_not_run_to_find_that_out(tmp_path):
    (hugging_face(tmp_path) / "kernels/__init__.py").write_text("raise RuntimeError('this ran')")
    assert "is another package than gptfast's" in error(python("import gptfast", tmp_path, ROOT))


def test_a_module_of_that_name(tmp_path):
    (tmp_path / "kernels.py").write_text("")
    assert f"kernels in {tmp_path / 'kernels.py'} is another package" in error(python("import gptfast", tmp_path, ROOT))


def installed(folder: Path) -> Path:
    """Both packages of this project, as pip puts them."""
    for name in ("gptfast", "kernels"):
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)
    return folder


def test_theirs_over_ours(tmp_path):
    hugging_face(installed(tmp_path))
    assert error(python("import gptfast", tmp_path)) == (
        "ImportError: another package called kernels, such as Hugging Face's, was installed over gptfast's in "
        f"{tmp_path / 'kernels'}; pip uninstall kernels, then install gptfast again "
        "(pip install --force-reinstall --no-deps)"
    )


def test_theirs_uninstalled_after_that(tmp_path):
    hugging_face(installed(tmp_path))
    (tmp_path / "kernels/__init__.py").unlink()
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]; import gptfast"
    assert error(python(code, tmp_path)) == (
        f"ImportError: gptfast's package kernels is damaged: {tmp_path / 'kernels'} has no __init__.py, which Hugging "
        "Face's package of the same name takes along when it is uninstalled; install gptfast again (pip install "
        "--force-reinstall --no-deps)"
    )
    shutil.rmtree(tmp_path / "kernels")
    assert error(python(code, tmp_path)) == (
        f"ImportError: gptfast's package kernels is missing, it should be in {tmp_path / 'kernels'}; install gptfast "
        "again (pip install --force-reinstall --no-deps)"
    )


def test_ours_in_its_place():
    import_guard.require_own_kernels()
