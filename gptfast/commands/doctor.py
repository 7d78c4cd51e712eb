"""The command `gptfast doctor`: what is installed, what runs where and why, and what is broken."""

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
from gptfast import backend, devices, hardware
from gptfast.checkpoint.atomic_files import read_json
from kernels import hf_kernels, runtime
from kernels.pytorch_internals import inductor_cache_dir

_OTHERS = ("transformers", "liger-kernel", "flash-attn", "huggingface-hub", "tiktoken", "safetensors", "numpy")
_DRIVER, _DEVICES = Path("/proc/driver/nvidia/version"), Path("/dev")
_HEAD_SIZE = 64  # of GPT-2, whatever its size


@dataclass
class Report:
    """What was found, in sections of names and values.

    Args:
        sections: by their titles.
        problems: what is broken, and what to do, a line each.
    """

    sections: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        """Note what is broken, once."""
        if problem not in self.problems:
            self.problems.append(problem)

    def __str__(self) -> str:
        lines = []
        for title, entries in self.sections.items():
            width = max(len(name) for name, _ in entries)
            lines += [title, *(f"  {name:{width}}  {value}".rstrip() for name, value in entries)]
        return "\n".join(lines)


@dataclass
class DoctorConfig:
    """Show what is installed, what runs where and why, and what is broken."""


def run(config: DoctorConfig) -> None:
    """Print the report; exit with status 1 if something is broken."""
    report = examine()
    print(report)
    for problem in report.problems:
        print(f"gptfast: {problem}", file=sys.stderr)
    if report.problems:
        sys.exit(1)


def examine() -> Report:
    """Look at everything that decides how fast things go here, or whether they do. Leaves everything as it is."""
    report = Report()
    here = _devices()
    for title, look in {
        "versions": _versions(report),
        "devices": _peaks(report, here),
        "operators, with the backend auto": _operators(report, here),
        "launches of kernels": _launches(report, here),
        "folders": _folders(report),
        "packages called kernels": _packages(report),
    }.items():
        report.sections[title] = list(look)
    return report


def _devices() -> list[torch.device]:
    found = [
        torch.device("cuda", index) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return [*found, torch.device("cpu")]


def _versions(report: Report) -> Iterator[tuple[str, str]]:
    yield "gptfast", f"{gptfast.__version__}, in {Path(gptfast.__file__).parent}"
    yield "Python", f"{platform.python_version()}, {sys.executable}"
    yield "system", platform.platform()
    yield "PyTorch", f"{torch.__version__}{_accelerator()}"
    driver, gpus = _nvidia_driver(), list(_DEVICES.glob("nvidia[0-9]*"))
    yield "NVIDIA driver", driver or "none"
    if gpus and not torch.cuda.is_available() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        if torch.version.cuda is None:
            way_out = f"PyTorch {torch.__version__} is built without CUDA; install a build with it (see pytorch.org)"
        else:
            way_out = (
                f"PyTorch with CUDA {torch.version.cuda} cannot use it; update the driver ({driver or 'none'}), or "
                "install a build with an older CUDA"
            )
        report.add(f"there is a GPU, and {way_out}")
    for name in ("triton", *_OTHERS):
        yield ("Triton" if name == "triton" else name), _version(name) or "not installed"
    for name, (given, needed) in _out_of_range().items():
        report.add(f"{name} {given} is installed, {needed} is needed; pip install '{name}{needed}'")


def _accelerator() -> str:
    if torch.version.hip is not None:
        return f", with ROCm {torch.version.hip}"
    return ", for CPUs" if torch.version.cuda is None else f", with CUDA {torch.version.cuda}"


def _nvidia_driver() -> str | None:
    """The version of NVIDIA's driver for Linux, where there is one."""
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


def _out_of_range() -> dict[str, tuple[str, str]]:
    """Of installed packages that gptfast needs in another version, that and the one needed."""
    wrong = {}
    for requirement in importlib.metadata.requires("gptfast") or () if _version("gptfast") else ():
        found = re.match(r"(torch|triton)(?![\w-])\s*([^;]*)", requirement)
        given = _version(found[1]) if found else None
        if found and given and not _satisfies(given, found[2]):
            wrong[found[1]] = given, found[2].strip()
    return wrong


def _satisfies(version: str, conditions: str) -> bool:
    """Whether a version fulfils conditions such as ">=3.6,<3.10", which compare releases alone."""
    for condition in conditions.split(","):
        found = re.match(r"\s*(>=|<)\s*([\d.]+)", condition)
        if found and (_release(version) >= _release(found[2])) != (found[1] == ">="):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", version)[0]))


def _peaks(report: Report, here: list[torch.device]) -> Iterator[tuple[str, str]]:
    for device in here:
        try:
            said = hardware.describe(device)
        except ValueError as error:  # a variable that is no number
            said = "no peak"
            report.add(str(error))
        name = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
        yield str(device), f"{name}{said}"


def _operators(report: Report, here: list[torch.device]) -> Iterator[tuple[str, str]]:
    for device in here:
        # by what is said of them, the operators and dtypes of which it is
        said: dict[str, dict[str, list[str]]] = {}
        for dtype in devices.DTYPES:
            model = device, getattr(torch, dtype), _HEAD_SIZE
            choices = backend.resolve_backend(backend.parse_backend("auto"), *model)
            for operator, reason in backend.reasons(*model).items():
                text = choices[operator] if reason is None else f"{choices[operator]} ({reason})"
                said.setdefault(text, {}).setdefault(dtype, []).append(operator)
        for text, by_dtype in said.items():
            groups: dict[tuple[str, ...], list[str]] = {}
            for dtype, operators in by_dtype.items():
                groups.setdefault(tuple(operators), []).append(dtype)
            for operators_of, dtypes in groups.items():
                yield f"{device}, {', '.join(dtypes)}", f"{', '.join(operators_of)}: {text}"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) >= runtime.LOWEST_CAPABILITY:
            reason = runtime.unsupported_reason(device)
            again = "--force-reinstall " if runtime.TRITON_INSTALLED else ""
            way_out = "" if runtime.missing_triton_reason() is None else f"; pip install {again}triton"
            if reason is not None:
                report.add(f"nothing runs as kernels on the GPU: {reason}{way_out}")


def _launches(report: Report, here: list[torch.device]) -> Iterator[tuple[str, str]]:
    gpus = [device for device in here if device.type == "cuda"]
    if not gpus or runtime.missing_triton_reason() is not None:
        yield "none", "no GPU" if not gpus else "no Triton"
        return
    from kernels import tuning

    for device in gpus:
        name, file = tuning.architecture(device), tuning.cache_file(device)
        table = tuning.TABLES / f"{name}.json"
        parts = []
        for path, source in ((file, "measured on this machine, "), (table, "measured, a table of gptfast's, ")):
            number = _measured_launches(path, report)
            if number:
                parts.append(f"{number} {source}in {path}")
        parts.append("others by rules" if parts else f"by rules: nobody has measured {name}")
        yield str(device), "; ".join(parts)


def _measured_launches(path: Path, report: Report) -> int:
    try:
        if not path.is_file():
            return 0
        return sum(len(problems) for problems in read_json(path)["launches"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        report.add(f"the launches in {path} cannot be read; delete that file")
        return 0


def _folders(report: Report) -> Iterator[tuple[str, str]]:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gptfast")
    found = {
        "gptfast": (home, "XDG_CACHE_HOME"),
        "measured launches": (Path(os.environ.get("GPTFAST_CACHE") or home, "launches"), "GPTFAST_CACHE"),
        "torch.compile": (
            Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or inductor_cache_dir()),
            "TORCHINDUCTOR_CACHE_DIR",
        ),
    }
    if runtime.missing_triton_reason() is None:
        import triton

        found["Triton"] = Path(triton.knobs.cache.dir), "TRITON_CACHE_DIR"
    for name, (path, variable) in found.items():
        if _writable(path):
            yield name, f"{path}, can be written"
        else:
            yield name, f"{path}, cannot be written"
            report.add(f"{path} cannot be written; set {variable} to a folder that can")


def _writable(path: Path) -> bool:
    """Whether a folder, which need not be there yet, can be written. It is tried: permissions do not tell all."""
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    try:
        with tempfile.TemporaryDirectory(dir=path):
            return True
    except OSError:
        return False


def _packages(report: Report) -> Iterator[tuple[str, str]]:
    ours = Path(kernels.__file__).parent
    yield "gptfast's", f"{ours}, the one that is imported"
    theirs = hf_kernels.installed()
    if theirs is not None:
        folder, version = theirs
        if not folder.is_dir():
            yield "Hugging Face's", f"{version}, of which {folder} is not there"
        elif folder.samefile(ours):
            yield "Hugging Face's", f"{version}, gptfast's was installed over it"
            report.add(hf_kernels.overwritten(version))
        else:
            yield "Hugging Face's", f"{version} in {folder}, comes after gptfast's, which hands its names over"
    for entry in dict.fromkeys(sys.path):
        other = Path(entry or ".", "kernels")
        if (other / "__init__.py").is_file() and not any(
            other.samefile(known) for known in (ours, *(theirs[:1] if theirs and theirs[0].is_dir() else ()))
        ):
            yield "another", f"{other.absolute()}, comes after gptfast's and is never imported"
