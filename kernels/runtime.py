"""Which devices Triton kernels can run on here, and what a launch has to take care of. Imports no Triton by itself."""

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
MAX_HEAD_SIZE = 256  # of attention, a tile holds whole heads
# the oldest NVIDIA GPUs whose shared memory holds the kernels' blocks, and the first with bfloat16 and TF32
LOWEST_CAPABILITY = (8, 0)

# Part of the keys by which torch.compile keeps graphs on disk: they call operators by the signatures they were compiled
# with, and PyTorch does not see that those have changed. To be raised when they do.
_SIGNATURES = 3
torch.compiler.config.cache_key_tag += f"gptfast-{_SIGNATURES}"

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def why_not(device: torch.device) -> str | None:
    """The reason why Triton kernels cannot run on `device`, or None where they can.

    The meta device counts as able: operators have shapes there, and nothing is launched.
    """
    if (reason := why_no_triton()) is not None:
        return reason
    from kernels import tile

    if not tile.launchable(device):
        cuda = "" if torch.cuda.is_available() else ", and no CUDA device was found"
        return f"Triton kernels do not run on device {device.type!r}{cuda}"
    return _why_not_compiled(device) if device.type == "cuda" and not tile.INTERPRETED.value else None


def why_no_triton() -> str | None:
    """The reason why there is no Triton here, for any device, or None where it can be imported."""
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    try:
        import triton  # noqa: F401
    except (ImportError, OSError) as error:  # of its compiled parts, which are for another system
        return f"Triton is installed and cannot be imported: {' '.join(str(error).split())}"
    return None


def _why_not_compiled(device: torch.device) -> str | None:
    """Why kernels cannot be compiled for the GPU `device`, or None where they can."""
    if not torch.cuda.is_available():
        return "no CUDA device was found"
    capability = torch.cuda.get_device_capability(device)
    if capability < LOWEST_CAPABILITY:
        given, needed = (".".join(map(str, numbers)) for numbers in (capability, LOWEST_CAPABILITY))
        return f"the GPU has compute capability {given}, at least {needed} is needed"
    # Triton's own search: its launchers are built when a kernel first runs
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"Triton needs a C compiler and found no {' or '.join(compilers)}; the variable CC can name one"
    return None


def require_dtype(operator: str, tensor: torch.Tensor) -> None:
    """Raise TypeError unless the kernels can compute in the dtype of `tensor`."""
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{operator}: Triton computes in float32, float16 or bfloat16, got {tensor.dtype}; "
            f"kernels.reference.{operator} takes any floating dtype"
        )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that `torch.autocast` asks of matrix products on `device`, or None outside of it."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Make the GPU of `tensor` the current one: Triton launches on the current device, whatever its arguments."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def program_count(device: torch.device, per_processor: int) -> int:
    """How many programs a persistent kernel starts: `per_processor` on each multiprocessor of `device`."""
    if device.type != "cuda":
        return per_processor  # interpreted: programs run one after another
    return per_processor * _multiprocessors(device.index or 0)


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def unobserved(*tensors: torch.Tensor | None) -> bool:
    """Whether an operator's forward may be called past PyTorch's dispatcher, which takes as long as two launches.

    That is where nothing differentiates, compiles, traces, counts or fakes what is computed: plain inference.
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
    """A / b, rounded up. Triton's own takes a microsecond and more of each launch."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n. Triton's own takes as long as its cdiv."""
    return 1 << max(n - 1, 0).bit_length()


def rows_per_program(n_rows: int, programs: int, block: int) -> int:
    """How many of the rows each of `programs` walks over, in whole blocks."""
    return cdiv(cdiv(n_rows, programs), block) * block


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def dot_precision(dtype: torch.dtype) -> str:
    """What `tl.dot` is asked for: float32 follows PyTorch's setting for cuBLAS, by its older API or its newer one."""
    # the getter of the older API raises once the newer one was used; this one knows both
    exact = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "ieee" if exact else "tf32"


def dropout_seed(dropout_p: float, seed: int | torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """The seed as a tensor on `device`, drawn from PyTorch's generator if None; None without dropout.

    A tensor, because CUDA graphs replay addresses, not numbers.
    """
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(2**31, (1,), device=device)
    if isinstance(seed, torch.Tensor):
        return seed
    return torch.full((1,), seed, dtype=torch.int64, device=device)  # no copy from the host
