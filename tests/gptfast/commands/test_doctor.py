"""`gptfast doctor` tells what runs where and why, on machines of every kind, and what is broken."""

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
from gptfast.commands.doctor import Report
from kernels import hf_kernels, runtime, tile, tuning
from tests.support.namesakes import ROOT, hugging_face, python

EVERY = "layer_norm, ffn, attention, loss"


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch) -> Path:
    """One without a GPU, a driver and folders, whatever this one is; kernels are not interpreted."""
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
    """Two of a kind."""
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


def section(report: Report, title: str) -> dict[str, str]:
    (found,) = [entries for name, entries in report.sections.items() if name.startswith(title)]
    return {name: "; ".join(value for other, value in found if other == name) for name, _ in found}


def on_a_cpu(reason: str) -> str:
    return f"layer_norm, ffn, attention: cpu ({reason}); loss: eager ({reason})"


def test_a_machine_without_a_gpu():
    report = doctor.examine()
    assert report.problems == []
    versions = section(report, "versions")
    assert versions["gptfast"] == f"{gptfast.__version__}, in {ROOT / 'gptfast'}"
    assert versions["Python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert versions["PyTorch"].startswith(torch.__version__)
    assert versions["Triton"] == importlib.metadata.version("triton")
    assert versions["NVIDIA driver"] == "none"
    assert {"transformers", "liger-kernel", "flash-attn"} <= set(versions)
    assert section(report, "devices") == {"cpu": "CPU: 1 TFLOP/s fp32, 10 GB/s (measured)"}
    assert section(report, "operators") == {
        "cpu, float32, bfloat16, float16": on_a_cpu(
            "Triton kernels do not run on device 'cpu', and no CUDA device was found"
        )
    }
    assert section(report, "launches") == {"none": "no GPU"}
    assert section(report, "packages") == {"gptfast's": f"{ROOT / 'kernels'}, the one that is imported"}


def test_the_interpreter_is_not_what_auto_takes(monkeypatch):
    monkeypatch.setattr(tile, "_INTERPRETED", True)
    (said,) = section(doctor.examine(), "operators").values()
    assert said == on_a_cpu("Triton's interpreter runs only on request")


def test_a_machine_with_gpus(gpus):
    report = doctor.examine()
    assert report.problems == []
    found = section(report, "devices")
    assert list(found) == ["cuda:0", "cuda:1", "cpu"]
    assert found["cuda:1"].startswith("NVIDIA H100 80GB HBM3, H100 SXM: 989 TFLOP/s bf16, 3.35 TB/s (NVIDIA H100")
    assert section(report, "operators") == {
        "cuda:0, float32, bfloat16, float16": f"{EVERY}: triton",
        "cuda:1, float32, bfloat16, float16": f"{EVERY}: triton",
        "cpu, float32, bfloat16, float16": on_a_cpu("Triton kernels do not run on device 'cpu'"),
    }
    assert section(report, "launches") == {f"cuda:{index}": "by rules: nobody has measured sm_90" for index in range(2)}


def test_a_gpu_that_the_table_does_not_know(gpus):
    gpus.name = "NVIDIA X1"
    assert "unknown GPU 'NVIDIA X1': no peak, set GPTFAST_PEAK_FLOPS" in section(doctor.examine(), "devices")["cuda:0"]


def test_a_gpu_that_kernels_are_not_for(gpus):
    """That is how it is, and not broken."""
    gpus.major, gpus.minor = 7, 5
    report = doctor.examine()
    assert section(report, "operators")["cuda:0, float32, bfloat16, float16"] == (
        f"{EVERY}: eager (the GPU has compute capability 7.5, at least 8.0 is needed)"
    )
    assert report.problems == []


def test_operators_that_differ(gpus, monkeypatch):
    monkeypatch.setattr(doctor, "_HEAD_SIZE", 260)
    found = doctor.examine().sections["operators, with the backend auto"]
    assert ("cuda:0, float32, bfloat16, float16", "layer_norm, ffn, loss: triton") in found
    assert (
        "cuda:0, float32, bfloat16, float16", "attention: eager (the head size is 260, at most 256 is accepted)"
    ) in found  # fmt: skip


def test_dtypes_that_differ(gpus, monkeypatch):
    monkeypatch.setattr(runtime, "DTYPES", (torch.float32, torch.float16))
    found = section(doctor.examine(), "operators")
    assert found["cuda:0, float32, float16"] == f"{EVERY}: triton"
    assert found["cuda:0, bfloat16"].startswith(f"{EVERY}: eager (the dtype is torch.bfloat16, float32, ")


def test_without_triton(gpus, monkeypatch):
    monkeypatch.setattr(runtime, "TRITON_INSTALLED", False)
    report = doctor.examine()
    assert report.problems == ["nothing runs as kernels on the GPU: Triton is not installed; pip install triton"]
    assert (
        section(report, "operators")["cuda:0, float32, bfloat16, float16"]
        == f"{EVERY}: eager (Triton is not installed)"
    )
    assert section(report, "launches") == {"none": "no Triton"}
    assert "Triton" not in section(report, "folders")


def test_without_a_compiler(gpus, monkeypatch):
    monkeypatch.setattr(runtime.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    report = doctor.examine()
    reason = "Triton needs a C compiler and found no gcc or clang; the variable CC can name one"
    assert report.problems == [f"nothing runs as kernels on the GPU: {reason}"]
    assert section(report, "operators")["cuda:1, float32, bfloat16, float16"] == f"{EVERY}: eager ({reason})"


def test_a_triton_that_cannot_be_imported(gpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    report = doctor.examine()
    reason = "Triton is installed and cannot be imported: import of triton halted; None in sys.modules"
    assert report.problems == [f"nothing runs as kernels on the GPU: {reason}; pip install --force-reinstall triton"]
    assert section(report, "operators")["cuda:0, float32, bfloat16, float16"] == f"{EVERY}: eager ({reason})"
    assert section(report, "launches") == {"none": "no Triton"}
    assert "Triton" not in section(report, "folders")


def test_a_triton_of_another_system(tmp_path, measured):
    """As a person sees it who has no GPU: nothing is broken, and models run."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text("raise ImportError('libtriton.so:\\n GLIBC_2.38 not found')")
    code = "from gptfast import cli, GPT, GPTConfig; cli.main(['doctor']); GPT(GPTConfig(n_layer=1, vocab_size=9))"
    done = python(f"import sys; {code}", tmp_path, ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "cpu (Triton is installed and cannot be imported: libtriton.so: GLIBC_2.38 not found)" in done.stdout


def launches(path: Path, name: str, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"launches": {name: {str(problem): {} for problem in range(number)}, "other": {"1": {}}}})
    )


def test_launches_that_were_measured(gpus, machine, monkeypatch):
    monkeypatch.setattr(tuning, "TABLES", machine / "tables")
    launches(machine / "tables/sm_80.json", "norm", 9)  # of another kind
    assert section(doctor.examine(), "launches")["cuda:0"] == "by rules: nobody has measured sm_90"
    launches(machine / "tables/sm_90.json", "norm", 3)
    table = f"4 measured, a table of gptfast's, in {machine / 'tables/sm_90.json'}; others by rules"
    assert section(doctor.examine(), "launches")["cuda:0"] == table
    file = tuning.cache_file(torch.device("cuda", 0))
    launches(file, "norm", 1)
    assert section(doctor.examine(), "launches")["cuda:1"] == f"2 measured on this machine, in {file}; {table}"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"launches": 3}', '{"launches": {"norm": 3}}'])
def test_launches_that_are_damaged(gpus, content: str):
    file = tuning.cache_file(torch.device("cuda", 0))
    file.parent.mkdir(parents=True)
    file.write_text(content)
    report = doctor.examine()
    assert report.problems == [f"the launches in {file} cannot be read; delete that file"]
    assert section(report, "launches")["cuda:0"] == "by rules: nobody has measured sm_90"


def test_launches_in_a_folder_that_cannot_be_read(gpus, machine, monkeypatch):
    """Also root may not look into what has so long a name."""
    monkeypatch.setenv("GPTFAST_CACHE", str(machine / ("x" * 300)))
    file = tuning.cache_file(torch.device("cuda", 0))
    assert f"the launches in {file} cannot be read; delete that file" in doctor.examine().problems


@pytest.fixture
def driver(machine) -> None:
    (machine / "dev").mkdir()
    (machine / "dev/nvidia0").touch()
    (machine / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\nGCC version:"
    )


def test_a_gpu_and_a_pytorch_for_cpus(driver, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    report = doctor.examine()
    assert section(report, "versions")["NVIDIA driver"] == "535.104.05"
    assert report.problems == [
        f"there is a GPU, and PyTorch {torch.__version__} is built without CUDA; install a build with it "
        "(see pytorch.org)"
    ]


def test_a_gpu_whose_driver_is_too_old(driver, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    report = doctor.examine()
    assert section(report, "versions")["PyTorch"] == f"{torch.__version__}, with CUDA 13.0"
    assert report.problems == [
        "there is a GPU, and PyTorch with CUDA 13.0 cannot use it; update the driver (535.104.05), or install a build "
        "with an older CUDA"
    ]


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_gpu_that_is_hidden(driver, monkeypatch, hidden: str):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert doctor.examine().problems == []


@pytest.mark.parametrize(
    ("version", "conditions", "fulfilled"),
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
def test_versions_that_do(monkeypatch, version: str, conditions: str, fulfilled: bool):
    requirements = [f'triton{conditions}; sys_platform == "linux"', "torchvision>=99", 'thop; extra == "bench"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requirements)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    problem = f"triton {version} is installed, {conditions} is needed; pip install 'triton{conditions}'"
    assert doctor.examine().problems == ([] if fulfilled else [problem])


def test_a_checkout_that_is_not_installed(monkeypatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    report = doctor.examine()
    assert report.problems == []
    assert section(report, "versions")["Triton"] == "not installed"


def test_folders(machine, monkeypatch):
    assert section(doctor.examine(), "folders") == {
        "gptfast": f"{machine / 'XDG_CACHE_HOME/gptfast'}, can be written",
        "measured launches": f"{machine / 'XDG_CACHE_HOME/gptfast/launches'}, can be written",
        "torch.compile": f"{machine / 'TORCHINDUCTOR_CACHE_DIR'}, can be written",
        "Triton": f"{machine / 'TRITON_CACHE_DIR'}, can be written",
    }
    assert sorted(machine.iterdir()) == [], "something was left behind"
    monkeypatch.setenv("GPTFAST_CACHE", str(machine / "own"))
    assert section(doctor.examine(), "folders")["measured launches"] == f"{machine / 'own/launches'}, can be written"


@pytest.mark.parametrize(
    ("variable", "folder"),
    [
        ("XDG_CACHE_HOME", "gptfast"),
        ("GPTFAST_CACHE", "launches"),
        ("TRITON_CACHE_DIR", ""),
        ("TORCHINDUCTOR_CACHE_DIR", ""),
    ],
)
def test_folders_that_cannot_be_written(machine, monkeypatch, variable: str, folder: str):
    (machine / "file").touch()
    monkeypatch.setenv(variable, str(machine / "file/cache"))
    if variable == "XDG_CACHE_HOME":
        monkeypatch.setenv("GPTFAST_CACHE", str(machine))
    report = doctor.examine()
    path = machine / "file/cache" / folder
    assert report.problems == [f"{path} cannot be written; set {variable} to a folder that can"]
    assert [value for value in section(report, "folders").values() if value.endswith(", cannot be written")] == [
        f"{path}, cannot be written"
    ]


def test_a_peak_that_is_no_number(gpus, monkeypatch):
    monkeypatch.setenv(hardware.FLOPS_VARIABLE, "much")
    report = doctor.examine()
    assert report.problems == [
        "GPTFAST_PEAK_FLOPS is 'much'; accepted: a positive finite number of FLOP/s such as 989e12"
    ]
    assert section(report, "devices")["cpu"] == "no peak"


def test_theirs_behind_ours(machine, monkeypatch):
    monkeypatch.setattr(hf_kernels, "installed", lambda: (machine / "kernels", "0.18.2"))
    (machine / "kernels").mkdir()
    report = doctor.examine()
    assert section(report, "packages")["Hugging Face's"] == (
        f"0.18.2 in {machine / 'kernels'}, comes after gptfast's, which hands its names over"
    )
    assert report.problems == []


def test_metadata_of_theirs_alone(machine, monkeypatch):
    monkeypatch.setattr(hf_kernels, "installed", lambda: (machine / "kernels", "0.18.2"))
    report = doctor.examine()
    assert section(report, "packages")["Hugging Face's"] == f"0.18.2, of which {machine / 'kernels'} is not there"
    assert report.problems == []


def test_ours_over_theirs(monkeypatch):
    monkeypatch.setattr(hf_kernels, "installed", lambda: (ROOT / "kernels", "0.18.2"))
    report = doctor.examine()
    assert section(report, "packages")["Hugging Face's"] == "0.18.2, gptfast's was installed over it"
    assert report.problems == [hf_kernels.overwritten("0.18.2")]
    assert "pip uninstall kernels, then install gptfast again" in report.problems[0]


def test_yet_another_package(machine, monkeypatch):
    for entry in (machine / "theirs", machine / "own"):
        (entry / "kernels").mkdir(parents=True)
        (entry / "kernels/__init__.py").touch()
        monkeypatch.syspath_prepend(str(entry))
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(hf_kernels, "installed", lambda: (machine / "theirs/kernels", "0.18.2"))
    found = section(doctor.examine(), "packages")
    assert found["another"] == f"{machine / 'own/kernels'}, comes after gptfast's and is never imported"
    assert len(found) == 3


@pytest.fixture
def measured(monkeypatch) -> None:
    """What takes seconds of a CPU, and no GPU for processes of their own."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for variable in (hardware.FLOPS_VARIABLE, hardware.BANDWIDTH_VARIABLE):
        monkeypatch.setenv(variable, "1e12")


def run(*path: Path) -> subprocess.CompletedProcess[str]:
    return python("import sys; sys.argv[1:] = ['doctor']; import gptfast.__main__", *path)


def test_theirs_in_place_of_ours_or_behind(machine, measured):
    """As a person sees it."""
    hugging_face(machine)
    behind, before = run(ROOT, machine), run(machine, ROOT)
    assert (behind.returncode, behind.stderr) == (0, "")
    assert re.search(rf"Hugging Face's +0\.18\.2 in {machine}/kernels, comes after gptfast's", behind.stdout)
    assert (before.returncode, before.stdout) == (1, "")
    assert before.stderr.splitlines()[-1].startswith(
        f"ImportError: kernels in {machine}/kernels is another package than"
    )
    shutil.copytree(ROOT / "kernels", machine / "kernels", dirs_exist_ok=True)
    over = run(machine, ROOT)
    assert over.returncode == 1
    assert over.stderr.startswith(
        "gptfast: gptfast's package kernels was installed over Hugging Face's (kernels 0.18.2)"
    )
    assert over.stderr.count("\n") == 1


def test_without_triton_and_without_a_gpu(measured):
    """In a process that has none: as on macOS, where nothing is broken."""
    code = "import sys; sys.modules['triton'] = None; from gptfast import cli; cli.main(['doctor'])"
    done = python(code, ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "cpu (Triton is not installed)" in done.stdout


def test_the_command(capsys, monkeypatch, machine):
    cli.main(["doctor"])
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.splitlines()[0] == "versions"
    assert f"\n  gptfast          {gptfast.__version__}, in " in printed.out
    assert printed.out == f"{doctor.examine()}\n"
    monkeypatch.setenv(hardware.FLOPS_VARIABLE, "much")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/dev/null/cache")
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor"])
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("versions\n")
    assert [line.split()[:2] for line in printed.err.splitlines()] == [
        ["gptfast:", "GPTFAST_PEAK_FLOPS"],
        ["gptfast:", "/dev/null/cache"],
    ]


def test_it_has_no_options(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--fix"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "gptfast: Unrecognized options: --fix\n"
