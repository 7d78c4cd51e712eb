"""Device support, and the host-side arithmetic of launches. Imports no Triton by itself."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.compiler.config

from kernels.pytorch_internals import current_dispatch_mode, current_functorch_level

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_SIZE = 256  # a tile of attention holds whole heads
LOG2_E = 1.4426950408889634  # attention scores are in units of log2: exp2 is the hardware's instruction
# the first NVIDIA GPUs with bfloat16, TF32 and enough shared memory for the kernels' tiles
LOWEST_CAPABILITY = (8, 0)

# Raise this number when an operator's signature changes: torch.compile caches graphs on disk, and a cached graph calls
# operators by the old signature.
_SIGNATURES = 3
torch.compiler.config.cache_key_tag += f"gptfast-{_SIGNATURES}"

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def unsupported_reason(device: torch.device) -> str | None:
    """Return the reason why Triton kernels cannot run on `device`, or None where they can.

    The meta device is supported: operators compute shapes there and launch nothing.
    """
    if (reason := missing_triton_reason()) is not None:
        return reason
    from kernels import tile

    if not tile.launchable(device):
        cuda = "" if torch.cuda.is_available() else ", and no CUDA device was found"
        return f"Triton kernels do not run on device {device.type!r}{cuda}"
    return _uncompilable_reason(device) if device.type == "cuda" and not tile.INTERPRETED.value else None


def missing_triton_reason() -> str | None:
    """Return the reason why Triton cannot be imported, or None where it can."""
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    try:
        import triton  # noqa: F401
    except (ImportError, OSError) as error:  # its libraries are built for another system
        return f"Triton is installed and cannot be imported: {' '.join(str(error).split())}"
    return None


def _uncompilable_reason(device: torch.device) -> str | None:
    """Return the reason why kernels cannot be compiled for the GPU `device`, or None where they can."""
    if not torch.cuda.is_available():
        return "no CUDA device was found"
    capability = torch.cuda.get_device_capability(device)
    if capability < LOWEST_CAPABILITY:
        given, needed = (".".join(map(str, numbers)) for numbers in (capability, LOWEST_CAPABILITY))
        return f"the GPU has compute capability {given}, at least {needed} is needed"
    # Triton builds a launcher when a kernel first runs, and searches for a compiler in this way
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"Triton needs a C compiler and found no {' or '.join(compilers)}; the variable CC can name one"
    return None


def require_dtype(operator: str, tensor: torch.Tensor) -> None:
    """Raise TypeError unless the kernels support the dtype of `tensor`."""
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{operator}: Triton computes in float32, float16 or bfloat16, got {tensor.dtype}; "
            f"kernels.reference.{operator} takes any floating dtype"
        )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of matmuls under `torch.autocast` on `device`, or None outside of it."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Make the GPU of `tensor` the current one. Triton launches on the current device, whatever its arguments."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def program_count(device: torch.device, per_processor: int) -> int:
    """Return the grid size of a persistent kernel: `per_processor` programs on each multiprocessor of `device`."""
    if device.type != "cuda":
        return per_processor  # the interpreter runs programs one after another
    return per_processor * _multiprocessors(device.index or 0)


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def can_skip_dispatcher(*tensors: torch.Tensor | None) -> bool:
    """Return True if plain inference may bypass the dispatcher, which takes as long as two launches.

    That is without gradients, compilation, tracing, dispatch modes, tensor subclasses and functorch transforms.
    """
    if torch.compiler.is_compiling() or current_dispatch_mode() is not None:
        return False
    differentiated = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        # subclasses (FakeTensor, DTensor, functorch's wrappers) have dispatch rules of their own
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.device.type == "meta":
            return False
        if differentiated and tensor.requires_grad:
            return False
    return current_functorch_level() is None


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up. `triton.cdiv` takes over a microsecond of each launch."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is not below n. `triton.next_power_of_2` is as slow as its cdiv."""
    return 1 << max(n - 1, 0).bit_length()


def rows_per_program(n_rows: int, programs: int, block: int) -> int:
    """Return the rows that each of `programs` processes, in whole blocks."""
    return cdiv(cdiv(n_rows, programs), block) * block


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def dot_precision(dtype: torch.dtype) -> str:
    """Return the `input_precision` of `tl.dot`: float32 follows PyTorch's setting for cuBLAS."""
    # set_float32_matmul_precision changes this one too; its getter raises once this one was set
    exact = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "ieee" if exact else "tf32"


def dropout_seed(dropout_p: float, seed: int | torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """Return the seed as a tensor on `device`, drawn from PyTorch's generator if None; None without dropout.

    CUDA graphs replay addresses, not numbers: the seed is a tensor for them.
    """
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(2**31, (1,), device=device)
    if isinstance(seed, torch.Tensor):
        return seed
    return torch.full((1,), seed, dtype=torch.int64, device=device)  # no copy from the host


def require_head_size(operator: str, x: torch.Tensor) -> None:
    """Raise TypeError or ValueError unless the kernels support the dtype and the head size of x [..., D]."""
    require_dtype(operator, x)
    if x.shape[-1] > MAX_HEAD_SIZE:
        raise ValueError(f"{operator}: the head size D must be at most {MAX_HEAD_SIZE}, got {x.shape[-1]}")


def padded_head_size(head_size: int) -> int:
    """Return the width of a tile of heads: a power of two that matrix units take."""
    return max(16, next_power_of_2(head_size))


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """Return x with stride 1 in its last dimension; a copy only where that is not so already."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def scale_or_default(scale: float | None, head_size: int) -> float:
    return head_size**-0.5 if scale is None else float(scale)
