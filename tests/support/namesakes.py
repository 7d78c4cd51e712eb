"""Installations of Hugging Face's package `kernels`, and Python processes that import it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# imports of transformers 5 from Hugging Face's package, whose modules import each other by absolute name
NAMES = (
    "CUDAProperties", "Device", "FuncRepository", "KernelizeFallback", "LayerRepository", "LocalLayerRepository",
    "Mode", "ROCMProperties", "get_kernel", "kernelize", "register_kernel_mapping", "replace_kernel_forward_from_hub",
    "use_kernel_mapping",
)  # fmt: skip
_INIT = f"""
import importlib.metadata
__version__ = importlib.metadata.version("kernels")
from kernels.layer import {", ".join(NAMES)}, use_kernel_forward_from_hub, use_kernelized_func
from .loading import loaded
"""
_LAYER = f"""
from kernels.loading import loaded
for name in {NAMES!r}:
    globals()[name] = type(name, (), {{}})
def use_kernel_forward_from_hub(layer_name):
    return lambda layer: layer
def use_kernelized_func(*names):
    return lambda layer: layer
"""
_LOADING = """
loaded = "theirs"
def late():
    from kernels import Mode, get_kernel
    return get_kernel
"""


def hugging_face(folder: Path, version: str = "0.18.2") -> Path:
    """Write modules and metadata to `folder` as pip does for Hugging Face's package. Returns the folder."""
    package, metadata = folder / "kernels", folder / f"kernels-{version}.dist-info"
    for path, content in {
        package / "__init__.py": _INIT,
        package / "layer" / "__init__.py": _LAYER,
        package / "loading.py": _LOADING,
        metadata / "METADATA": f"Metadata-Version: 2.4\nName: kernels\nVersion: {version}\n",
        metadata / "RECORD": "kernels/__init__.py,,\nkernels/layer/__init__.py,,\nkernels/loading.py,,\n",
        metadata / "INSTALLER": "pip\n",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a new Python process with these folders first on sys.path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path.home().anchor, check=False)
