"""The command `gptfast doctor`: what is installed, which implementation runs where and why, and what is broken."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

import gptfast
import kernels
from gptfast import devices, hardware
from gptfast.backend import parse_backend, reasons, resolve_backend
from gptfast.checkpoint.atomic_files import read_json
from kernels import hf_kernels, runtime
from kernels.pytorch_internals import inductor_cache_dir

_PACKAGES = ("transformers", "liger-kernel", "flash-attn", "huggingface-hub", "tiktoken", "safetensors", "numpy")
_DRIVER, _DEVICES = Path("/proc/driver/nvidia/version"), Path("/dev")
_HEAD_SIZE = 64  # every GPT-2's


@dataclass
class DoctorConfig:
    """Show what is installed, which implementation runs where and why, and what is broken."""


@dataclass
class Section:
    """The result of one check.

    Args:
        title: heading of the section.
        rows: names and values.
        problems: what is broken and what to do, one line each.
    """

    title: str
    rows: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, name: str, value: str) -> None:
        self.rows.append((name, value))

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows)
        return "\n".join([self.title, *(f"  {name:{width}}  {value}".rstrip() for name, value in self.rows)])


def run(config: DoctorConfig) -> None:
    """Print all sections, and problems to standard error. Exit with status 1 if there are problems."""
    sections = diagnose()
    print(*sections, sep="\n")
    problems = dict.fromkeys(problem for section in sections for problem in section.problems)
    for problem in problems:
        print(f"gptfast: {problem}", file=sys.stderr)
    if problems:
        sys.exit(1)


def diagnose() -> list[Section]:
    """Run all checks. None of them changes anything."""
    available = available_devices()
    return [
        check_versions(),
        check_peaks(available),
        check_operators(available),
        check_tuning(available),
        check_folders(),
        check_packages_named_kernels(),
    ]


def available_devices() -> list[torch.device]:
    """List all GPUs, then the CPU."""
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [f"cuda:{index}" for index in range(n_gpus)] + (["mps"] if torch.backends.mps.is_available() else [])
    return [torch.device(name) for name in (*gpus, "cpu")]


def check_versions() -> Section:
    """Check that PyTorch can use the GPU, and that gptfast supports the installed versions."""
    accelerators = {"ROCm": torch.version.hip, "CUDA": torch.version.cuda}
    accelerator = next((f"{name} {version}" for name, version in accelerators.items() if version), "CPU only")
    driver = _nvidia_driver()
    rows = [
        ("gptfast", f"{gptfast.__version__}, in {Path(gptfast.__file__).parent}"),
        ("Python", f"{platform.python_version()}, {sys.executable}"),
        ("system", platform.platform()),
        ("PyTorch", f"{torch.__version__}, {accelerator}"),
        ("NVIDIA driver", driver or "none"),
        *((name, _version(name.lower()) or "not installed") for name in ("Triton", *_PACKAGES)),
    ]
    return Section("versions", rows, [*_driver_problems(driver), *_unmet_requirements()])


def _driver_problems(driver: str | None) -> Iterator[str]:
    """Yield a problem if PyTorch cannot use an NVIDIA GPU of the system that the environment does not hide."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or torch.cuda.is_available() or not any(_DEVICES.glob("nvidia[0-9]*")):
        return
    if torch.version.cuda is None:
        yield f"PyTorch {torch.__version__} is built without CUDA; install a build for this GPU (see pytorch.org)"
    else:
        way_out = f"update the driver ({driver or 'none'}), or install a build with an older CUDA"
        yield f"PyTorch with CUDA {torch.version.cuda} cannot use the GPU; {way_out}"


def _nvidia_driver() -> str | None:
    """Return the version of NVIDIA's Linux driver, or None."""
    try:
        text = _DRIVER.read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _unmet_requirements() -> Iterator[str]:
    """Yield a problem for PyTorch or Triton in a version that gptfast's metadata excludes."""
    if _version("gptfast") is None:  # a checkout
        return
    for requirement in importlib.metadata.requires("gptfast") or ():
        found = re.match(r"(torch|triton)(?![\w-])\s*([^;]*)", requirement)
        installed = _version(found[1]) if found else None
        if found and installed and not _satisfies(installed, found[2]):
            needed = found[2].strip()
            yield f"{found[1]} {installed} is installed, {needed} is needed; pip install '{found[1]}{needed}'"


def _satisfies(version: str, specifiers: str) -> bool:
    """Compare releases only: 2.12.0a0 satisfies >=2.12, unlike for pip."""

    def release(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", text)[0]))

    bounds = re.findall(r"(>=|<)\s*([\d.]+)", specifiers)
    return all((release(version) >= release(bound)) == (operator == ">=") for operator, bound in bounds)


def check_peaks(available: list[torch.device]) -> Section:
    """Check that each device has a known peak."""
    section = Section("devices")
    for device in available:
        try:
            peaks = hardware.describe(device)
        except ValueError as error:  # an environment variable is not a number
            peaks = "no peak"
            section.problems.append(str(error))
        name = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
        section.add(str(device), name + peaks)
    return section


def check_operators(available: list[torch.device]) -> Section:
    """Show which implementation the backend "auto" chooses for each operator, and why not Triton."""
    section = Section("operators, with the backend auto")
    for device in available:
        dtypes: dict[tuple[str, ...], list[str]] = {}  # grouped by choices
        for dtype in devices.DTYPES:
            dtypes.setdefault(_choices(device, getattr(torch, dtype)), []).append(dtype)
        for choices, names in dtypes.items():
            for choice in choices:
                section.add(f"{device}, {', '.join(names)}", choice)
        supported = device.type == "cuda" and torch.cuda.get_device_capability(device) >= runtime.LOWEST_CAPABILITY
        if supported and (reason := runtime.unsupported_reason(device)) is not None:
            force = "--force-reinstall " if runtime.TRITON_INSTALLED else ""
            way_out = "" if runtime.missing_triton_reason() is None else f"; pip install {force}triton"
            section.problems.append(f"Triton kernels do not run on the GPU: {reason}{way_out}")
    return section


def _choices(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Return one line per implementation: its operators and the reason."""
    backend = resolve_backend(parse_backend("auto"), device, dtype, _HEAD_SIZE)
    operators: dict[str, list[str]] = {}
    for operator, reason in reasons(device, dtype, _HEAD_SIZE).items():
        choice = backend[operator] if reason is None else f"{backend[operator]} ({reason})"
        operators.setdefault(choice, []).append(operator)
    return tuple(f"{', '.join(names)}: {choice}" for choice, names in operators.items())


def check_tuning(available: list[torch.device]) -> Section:
    """Count the tuned launch configurations of the kernels for each GPU."""
    section = Section("launch configurations")
    gpus = [device for device in available if device.type == "cuda"]
    if not gpus or runtime.missing_triton_reason() is not None:
        section.add("none", "no GPU" if not gpus else "no Triton")
        return section
    from kernels import tuning  # needs Triton

    for device in gpus:
        architecture = tuning.architecture(device)
        sources = {
            "tuned on this machine": tuning.cache_file(device),
            f"tuned for {architecture} and shipped with gptfast": tuning.TABLES / f"{architecture}.json",
        }
        parts = []
        for source, path in sources.items():
            try:
                count = sum(map(len, read_json(path)["launches"].values())) if path.is_file() else 0
            except (OSError, ValueError, KeyError, AttributeError, TypeError):
                section.problems.append(f"the launch configurations in {path} cannot be read; delete that file")
                continue
            if count:
                parts.append(f"{count} {source}, in {path}")
        parts.append("others by default" if parts else f"defaults, none tuned for {architecture}")
        section.add(str(device), "; ".join(parts))
    return section


def check_folders() -> Section:
    """Check that the cache folders can be written."""
    section = Section("cache folders")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gptfast")
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or inductor_cache_dir()
    folders = {
        "gptfast": (home, "XDG_CACHE_HOME"),
        "launch configurations": (Path(os.environ.get("GPTFAST_CACHE") or home, "launches"), "GPTFAST_CACHE"),
        "torch.compile": (Path(inductor), "TORCHINDUCTOR_CACHE_DIR"),
    }
    if runtime.missing_triton_reason() is None:
        import triton

        folders["Triton"] = Path(triton.knobs.cache.dir), "TRITON_CACHE_DIR"
    for name, (path, variable) in folders.items():
        writable = _is_writable(path)
        section.add(name, f"{path}, {'writable' if writable else 'not writable'}")
        if not writable:
            section.problems.append(f"{path} is not writable; set {variable} to a folder that is")
    return section


def _is_writable(path: Path) -> bool:
    """Try to write to a folder, or to the parent in which it would be created. Permission bits do not always decide."""
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    try:
        with tempfile.TemporaryDirectory(dir=path):
            return True
    except OSError:
        return False


def check_packages_named_kernels() -> Section:
    """Show which of several packages named `kernels` Python imports."""
    section = Section("packages named kernels")
    ours = Path(kernels.__file__).parent
    known = [ours]
    section.add("gptfast's", f"{ours}, imported")
    if (theirs := hf_kernels.installed()) is not None:
        folder, version = theirs
        if not folder.is_dir():
            section.add("Hugging Face's", f"{version}, but {folder} is missing")
        elif folder.samefile(ours):
            section.add("Hugging Face's", f"{version}, overwritten by gptfast's")
            section.problems.append(hf_kernels.overwritten(version))
        else:
            section.add("Hugging Face's", f"{version} in {folder}, behind gptfast's, which forwards its names")
            known.append(folder)
    for entry in dict.fromkeys(sys.path):
        other = Path(entry or ".", "kernels")
        if (other / "__init__.py").is_file() and not any(other.samefile(folder) for folder in known):
            section.add("another", f"{other.absolute()}, behind gptfast's, never imported")
    return section
