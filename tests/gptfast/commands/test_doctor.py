"""`gptfast doctor` shows what runs where and why, and what is broken, on all kinds of machines."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton.language as tl

import gptfast
from gptfast import cli, hardware
from gptfast.commands import doctor
from kernels import hf_kernels, runtime, tile, tuning
from tests.support.command_line import error
from tests.support.namesakes import ROOT, hugging_face, python

OPERATORS = "layer_norm, ffn, attention, loss"
DTYPES = "float32, bfloat16, float16"


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch) -> Path:
    """A machine without GPU, driver and cache folders, on which kernels are not interpreted."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(tile, "INTERPRETED", tl.constexpr(False))
    monkeypatch.setattr(tile, "_INTERPRETED", False)
    monkeypatch.setattr(doctor, "_DEVICES", tmp_path / "dev")
    monkeypatch.setattr(doctor, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr(hf_kernels, "installed", lambda: None)
    monkeypatch.setattr(hardware, "_measured_cpu_flops", lambda dtype: 1e12)
    monkeypatch.setattr(hardware, "_measured_cpu_bandwidth", lambda: 1e10)
    for name in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("GPTFAST_CACHE", hardware.FLOPS_VARIABLE, hardware.BANDWIDTH_VARIABLE, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def gpus(monkeypatch) -> SimpleNamespace:
    """Two equal GPUs; a test may change their fields."""
    kind = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: kind.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (kind.major, kind.minor))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: kind)
    monkeypatch.setattr(runtime.shutil, "which", lambda name: f"/usr/bin/{name}")
    tuning._architecture.cache_clear()
    yield kind
    tuning._architecture.cache_clear()


def section(title: str) -> dict[str, str]:
    """The rows of a section; values of one name are joined."""
    (found,) = [section for section in doctor.diagnose() if section.title.startswith(title)]
    return {name: "; ".join(value for other, value in found.rows if other == name) for name, _ in found.rows}


def problems() -> list[str]:
    return list(dict.fromkeys(problem for section in doctor.diagnose() for problem in section.problems))


def cpu_choices(reason: str) -> str:
    return f"layer_norm, ffn, attention: cpu ({reason}); loss: eager ({reason})"


def test_doctor_on_a_machine_without_a_gpu():
    assert problems() == []
    versions = section("versions")
    assert versions["gptfast"] == f"{gptfast.__version__}, in {ROOT / 'gptfast'}"
    assert versions["Python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert versions["PyTorch"].startswith(torch.__version__)
    assert versions["Triton"] == importlib.metadata.version("triton")
    assert versions["NVIDIA driver"] == "none"
    assert {"transformers", "liger-kernel", "flash-attn"} <= set(versions)
    assert section("devices") == {"cpu": "CPU: 1 TFLOP/s fp32, 10 GB/s (measured)"}
    reason = "Triton kernels do not run on device 'cpu', and no CUDA device was found"
    assert section("operators") == {f"cpu, {DTYPES}": cpu_choices(reason)}
    assert section("launch") == {"none": "no GPU"}
    assert section("packages") == {"gptfast's": f"{ROOT / 'kernels'}, imported"}


def test_operators_are_not_interpreted_by_default(monkeypatch):
    monkeypatch.setattr(tile, "_INTERPRETED", True)
    (choices,) = section("operators").values()
    assert choices == cpu_choices("Triton's interpreter runs only on request")


def test_doctor_on_a_machine_with_gpus(gpus):
    assert problems() == []
    found = section("devices")
    assert list(found) == ["cuda:0", "cuda:1", "cpu"]
    assert found["cuda:1"].startswith("NVIDIA H100 80GB HBM3, H100 SXM: 989 TFLOP/s bf16, 3.35 TB/s (NVIDIA H100")
    assert section("operators") == {
        f"cuda:0, {DTYPES}": f"{OPERATORS}: triton",
        f"cuda:1, {DTYPES}": f"{OPERATORS}: triton",
        f"cpu, {DTYPES}": cpu_choices("Triton kernels do not run on device 'cpu'"),
    }
    assert list(section("launch")) == ["cuda:0", "cuda:1"]


def test_gpu_without_support_is_not_a_problem(gpus):
    gpus.major, gpus.minor = 7, 5
    assert re.match(rf"{OPERATORS}: eager \(.*compute capability 7\.5", section("operators")[f"cuda:0, {DTYPES}"])
    assert problems() == []


def test_operators_and_dtypes_that_differ_have_their_own_reasons(gpus, monkeypatch):
    monkeypatch.setattr(doctor, "_HEAD_SIZE", 260)
    choices = section("operators")[f"cuda:0, {DTYPES}"]
    assert choices.startswith("layer_norm, ffn, loss: triton; attention: eager (the head size is 260")
    monkeypatch.setattr(doctor, "_HEAD_SIZE", 64)
    monkeypatch.setattr(runtime, "DTYPES", (torch.float32, torch.float16))
    rows = section("operators")
    assert rows["cuda:0, float32, float16"] == f"{OPERATORS}: triton"
    assert rows["cuda:0, bfloat16"].startswith(f"{OPERATORS}: eager (the dtype is torch.bfloat16")


@pytest.mark.parametrize(
    ("broken", "reason", "way_out"),
    [
        ("triton", "Triton is not installed", "; pip install triton"),
        ("import", "cannot be imported", "; pip install --force-reinstall triton"),
        ("compiler", "C compiler", ""),
    ],
)
def test_gpu_on_which_kernels_cannot_run_is_a_problem(gpus, monkeypatch, broken: str, reason: str, way_out: str):
    if broken == "triton":
        monkeypatch.setattr(runtime, "TRITON_INSTALLED", False)
    elif broken == "import":
        monkeypatch.setitem(sys.modules, "triton", None)
    else:
        monkeypatch.setattr(runtime.shutil, "which", lambda name: None)
        monkeypatch.delenv("CC", raising=False)
    (problem,) = problems()
    assert reason in problem
    assert problem.endswith(way_out)
    assert re.match(f"{OPERATORS}: eager \\(.*{reason}", section("operators")[f"cuda:0, {DTYPES}"])
    has_triton = broken == "compiler"
    assert ("Triton" in section("cache folders")) is has_triton
    assert has_triton or section("launch") == {"none": "no Triton"}


def write_launches(path: Path, name: str, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"launches": {name: {str(key): {} for key in range(number)}, "other": {"1": {}}}}))


def test_launch_configurations_are_counted(gpus, machine, monkeypatch):
    monkeypatch.setattr(tuning, "TABLES", machine / "tables")
    write_launches(machine / "tables/sm_80.json", "norm", 9)  # of another architecture
    assert "none tuned for sm_90" in section("launch")["cuda:0"]
    write_launches(machine / "tables/sm_90.json", "norm", 3)
    shipped = section("launch")["cuda:0"]
    assert re.fullmatch(rf"4 .*sm_90.* in {machine}/tables/sm_90.json; others by default", shipped)
    file = tuning.cache_file(torch.device("cuda", 0))
    write_launches(file, "norm", 1)
    assert section("launch")["cuda:1"] == f"2 tuned on this machine, in {file}; {shipped}"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"launches": 3}', '{"launches": {"norm": 3}}'])
def test_launch_configurations_that_are_damaged_are_a_problem(gpus, content: str):
    file = tuning.cache_file(torch.device("cuda", 0))
    file.parent.mkdir(parents=True)
    file.write_text(content)
    (problem,) = problems()
    assert f"{file} cannot be read" in problem
    assert "none tuned" in section("launch")["cuda:0"]


def test_launch_configurations_in_an_unreadable_folder_are_a_problem(gpus, machine, monkeypatch):
    monkeypatch.setenv("GPTFAST_CACHE", str(machine / ("x" * 300)))  # the name is too long, also for root
    assert any(f"{tuning.cache_file(torch.device('cuda', 0))} cannot be read" in problem for problem in problems())


@pytest.fixture
def driver(machine) -> None:
    (machine / "dev").mkdir()
    (machine / "dev/nvidia0").touch()
    (machine / "version").write_text("NVRM version: NVIDIA UNIX x86_64  535.104.05  Sat Aug 19\nGCC version:")


@pytest.mark.parametrize(("cuda", "words"), [(None, "without CUDA"), ("13.0", r"CUDA 13\.0 .*driver \(535\.104\.05\)")])
def test_gpu_that_pytorch_cannot_use_is_a_problem(driver, monkeypatch, cuda: str | None, words: str):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    (problem,) = problems()
    assert re.search(words, problem)
    versions = section("versions")
    assert versions["NVIDIA driver"] == "535.104.05"
    assert versions["PyTorch"] == f"{torch.__version__}, {'CPU only' if cuda is None else 'CUDA 13.0'}"
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert problems() == []


@pytest.mark.parametrize(
    ("version", "specifiers", "satisfied"),
    [
        ("2.13.0+cpu", ">=2.11", True),
        ("2.9.1", ">=2.11", False),
        ("2.12.0a0+git123", ">=2.11", True),
        ("3.10.0", "<3.10,>=3.6", False),
        ("3.9.9", "<3.10,>=3.6", True),
        ("3.6", ">=3.6,<3.10", True),
        ("3.5.9", ">=3.6,<3.10", False),
        ("1", "", True),
    ],
)
def test_versions_are_compared_by_release(monkeypatch, version: str, specifiers: str, satisfied: bool):
    requirements = [f'triton{specifiers}; sys_platform == "linux"', "torchvision>=99", 'thop; extra == "bench"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requirements)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    problem = f"triton {version} is installed, {specifiers} is needed; pip install 'triton{specifiers}'"
    assert problems() == ([] if satisfied else [problem])


def test_versions_of_a_checkout_that_is_not_installed(monkeypatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert problems() == []
    assert section("versions")["Triton"] == "not installed"


def test_cache_folders_are_left_alone(machine, monkeypatch):
    assert section("cache folders") == {
        "gptfast": f"{machine / 'XDG_CACHE_HOME/gptfast'}, writable",
        "launch configurations": f"{machine / 'XDG_CACHE_HOME/gptfast/launches'}, writable",
        "torch.compile": f"{machine / 'TORCHINDUCTOR_CACHE_DIR'}, writable",
        "Triton": f"{machine / 'TRITON_CACHE_DIR'}, writable",
    }
    assert sorted(machine.iterdir()) == []
    monkeypatch.setenv("GPTFAST_CACHE", str(machine / "own"))
    assert section("cache folders")["launch configurations"] == f"{machine / 'own/launches'}, writable"


@pytest.mark.parametrize(
    ("variable", "folder"),
    [
        ("XDG_CACHE_HOME", "gptfast"),
        ("GPTFAST_CACHE", "launches"),
        ("TRITON_CACHE_DIR", ""),
        ("TORCHINDUCTOR_CACHE_DIR", ""),
    ],
)
def test_cache_folder_that_cannot_be_written(machine, monkeypatch, variable: str, folder: str):
    (machine / "file").touch()
    monkeypatch.setenv(variable, str(machine / "file/cache"))
    if variable == "XDG_CACHE_HOME":
        monkeypatch.setenv("GPTFAST_CACHE", str(machine))
    path = machine / "file/cache" / folder
    (problem,) = problems()
    assert re.match(rf"{path} .*{variable}", problem)
    assert [row for row in section("cache folders").values() if "not writable" in row] == [f"{path}, not writable"]


def test_package_of_hugging_face_beside_ours(machine, monkeypatch):
    folder = machine / "kernels"
    monkeypatch.setattr(hf_kernels, "installed", lambda: (folder, "0.18.2"))
    assert section("packages")["Hugging Face's"] == f"0.18.2, but {folder} is missing"
    folder.mkdir()
    assert section("packages")["Hugging Face's"].startswith(f"0.18.2 in {folder}, behind gptfast's")
    assert problems() == []


def test_package_of_hugging_face_below_ours(monkeypatch):
    monkeypatch.setattr(hf_kernels, "installed", lambda: (ROOT / "kernels", "0.18.2"))
    assert section("packages")["Hugging Face's"] == "0.18.2, overwritten by gptfast's"
    (problem,) = problems()
    assert "pip uninstall kernels, then install gptfast again" in problem


def test_another_package_named_kernels(machine, monkeypatch):
    for entry in (machine / "theirs", machine / "own"):
        (entry / "kernels").mkdir(parents=True)
        (entry / "kernels/__init__.py").touch()
        monkeypatch.syspath_prepend(str(entry))
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(hf_kernels, "installed", lambda: (machine / "theirs/kernels", "0.18.2"))
    found = section("packages")
    assert found["another"].startswith(f"{machine / 'own/kernels'}, ")
    assert len(found) == 3


@pytest.fixture
def peaks(monkeypatch) -> None:
    """Environment of a subprocess: given peaks, which it would measure for seconds, and no GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for variable in (hardware.FLOPS_VARIABLE, hardware.BANDWIDTH_VARIABLE):
        monkeypatch.setenv(variable, "1e12")


def run(*path: Path) -> subprocess.CompletedProcess[str]:
    return python("import sys; sys.argv[1:] = ['doctor']; import gptfast.__main__", *path)


def test_process_with_the_package_of_hugging_face(machine, peaks):
    hugging_face(machine)
    behind, before = run(ROOT, machine), run(machine, ROOT)
    assert (behind.returncode, behind.stderr) == (0, "")
    assert re.search(rf"Hugging Face's +0\.18\.2 in {machine}/kernels, behind gptfast's", behind.stdout)
    assert (before.returncode, before.stdout) == (1, "")
    assert before.stderr.splitlines()[-1].startswith(f"ImportError: kernels in {machine}/kernels")
    shutil.copytree(ROOT / "kernels", machine / "kernels", dirs_exist_ok=True)
    over = run(machine, ROOT)
    assert over.returncode == 1
    assert "installed over Hugging Face's (kernels 0.18.2)" in over.stderr
    assert over.stderr.count("\n") == 1


def test_process_without_triton_or_with_one_that_cannot_load(tmp_path, peaks):
    """Without a GPU neither is a problem, and models run."""
    code = "from gptfast import cli, GPT, GPTConfig; cli.main(['doctor']); GPT(GPTConfig(n_layer=1, vocab_size=9))"
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text("raise ImportError('libtriton.so:\\n GLIBC_2.38 not found')")
    for setup, reason in (
        ("sys.modules['triton'] = None", "Triton is not installed"),
        (f"sys.path.insert(0, {str(tmp_path)!r})", "libtriton.so: GLIBC_2.38 not found"),
    ):
        done = python(f"import sys; {setup}; {code}", ROOT)
        assert (done.returncode, done.stderr) == (0, "")
        assert re.search(rf"cpu \(.*{re.escape(reason)}\)", done.stdout)


def test_command_prints_the_sections_and_then_the_problems(capsys, monkeypatch):
    cli.main(["doctor"])
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith("versions\n  gptfast ")
    assert printed.out == "".join(f"{section}\n" for section in doctor.diagnose())
    monkeypatch.setenv(hardware.FLOPS_VARIABLE, "much")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/dev/null/cache")
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor"])
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert re.search("devices\n  cpu +no peak\n", printed.out)
    assert [line.split()[:2] for line in printed.err.splitlines()] == [
        ["gptfast:", "GPTFAST_PEAK_FLOPS"],
        ["gptfast:", "/dev/null/cache"],
    ]


def test_command_has_no_options(capsys):
    assert "--fix" in error(capsys, "doctor", "--fix")
