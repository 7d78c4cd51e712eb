"""`import gptfast` beside, in front of and behind Hugging Face's package `kernels`."""

import shutil
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
# disable the editable installation of this project
ALONE = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]; "


def lines(code: str, *path: Path) -> list[str]:
    done = python(code, *path)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def import_error(*path: Path, code: str = "import gptfast") -> str:
    """Run code that ends with an ImportError, and return its message."""
    done = python(code, *path)
    assert done.returncode == 1
    error, _, message = done.stderr.splitlines()[-1].partition(": ")
    assert error == "ImportError"
    return message


def install(folder: Path) -> Path:
    """Copy both packages of this project to `folder`, as pip does."""
    for name in ("gptfast", "kernels"):
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)
    return folder


@pytest.mark.parametrize(
    "code", [OURS + GPT2 + THEIRS, GPT2 + THEIRS + OURS], ids=["gptfast first", "transformers first"]
)
def test_transformers_works_with_theirs_behind_ours(tmp_path, code: str):
    found = lines(code, ROOT, hugging_face(tmp_path))
    assert sorted(found) == ["(1, 4, 11) True", f"4 {ROOT / 'kernels/__init__.py'}", "True"]


def test_transformers_works_without_theirs():
    """transformers finds no version of `kernels` that it accepts, and does without."""
    assert sorted(lines(OURS + GPT2, ROOT)) == ["(1, 4, 11) False", f"4 {ROOT / 'kernels/__init__.py'}"]


def test_transformers_works_with_a_version_of_theirs_that_it_rejects(tmp_path):
    assert lines(GPT2, ROOT, hugging_face(tmp_path, "0.9.0")) == ["(1, 4, 11) False"]


def test_import_fails_with_theirs_in_front(tmp_path):
    message = import_error(hugging_face(tmp_path), ROOT)
    for part in (f"kernels in {tmp_path / 'kernels'}", str(ROOT / "kernels"), f"PYTHONPATH={ROOT}"):
        assert part in message
    assert import_error(tmp_path, ROOT, code="import kernels, gptfast") == message
    assert lines("import kernels; print(kernels.loaded)", tmp_path, ROOT) == ["theirs"]


def test_import_fails_without_running_the_other_package(tmp_path):
    (hugging_face(tmp_path) / "kernels/__init__.py").write_text("raise RuntimeError('this ran')")
    assert f"kernels in {tmp_path / 'kernels'}" in import_error(tmp_path, ROOT)


def test_import_fails_with_a_module_of_that_name_in_front(tmp_path):
    (tmp_path / "kernels.py").write_text("")
    assert f"kernels in {tmp_path / 'kernels.py'}" in import_error(tmp_path, ROOT)


def test_import_fails_with_theirs_installed_over_ours(tmp_path):
    hugging_face(install(tmp_path))
    message = import_error(tmp_path)
    assert f"installed over gptfast's in {tmp_path / 'kernels'}" in message
    assert "pip uninstall kernels" in message


def test_import_fails_where_the_removal_of_theirs_damaged_ours(tmp_path):
    hugging_face(install(tmp_path))
    (tmp_path / "kernels/__init__.py").unlink()
    message = import_error(tmp_path, code=f"{ALONE}import gptfast")
    assert f"{tmp_path / 'kernels'} has no __init__.py" in message
    assert "pip install --force-reinstall --no-deps" in message
    shutil.rmtree(tmp_path / "kernels")
    assert f"missing, expected in {tmp_path / 'kernels'}" in import_error(tmp_path, code=f"{ALONE}import gptfast")


def test_require_own_kernels_accepts_ours():
    import_guard.require_own_kernels()
