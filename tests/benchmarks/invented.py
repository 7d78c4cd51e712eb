"""Invented results of invented devices, in the form of measured ones."""

import json
import zlib
from pathlib import Path

COPY, MATRIX = 4e12, {"bfloat16": 700e12, "float32": 50e12}
SIZES = {"bfloat16": 2, "float32": 4}
GPU = {
    "device": "Fixture GPU",
    "slug": "fixture-gpu",
    "kind": "cuda",
    "driver": "999.10",
    "cuda": "99.0",
    "torch": "9.9.0",
    "triton": "9.7.0",
    "gptfast": "0.0.0",
    "python": "3.99.0",
    "threads": 16,
    "peers": {"liger-kernel": "0.0.1", "transformers": "0.0.2", "nanoGPT": None},
    "limits": {"copy_bytes_per_second": COPY, "matrix_flops_per_second": MATRIX},
    "peak": {"name": "Fixture", "flops": {"bfloat16": 1000e12}, "bandwidth": 5e12, "source": "invented data sheet"},
}
NO_PEAK = {"name": None, "flops": {}, "bandwidth": None, "source": None}
UNKNOWN_GPU = GPU | {"device": "Fixture GPU without data sheet", "slug": "fixture-unknown", "peak": NO_PEAK}
CPU = GPU | {
    "device": "Fixture CPU",
    "slug": "fixture-cpu",
    "kind": "cpu",
    "peak": NO_PEAK | {"flops": None},
    "driver": None,
    "cuda": None,
    "triton": None,
    "limits": {"copy_bytes_per_second": 4e10, "matrix_flops_per_second": {"float32": 1e12}},
}
# times that tests state ratios of
SECONDS = {
    "bfloat16 32768x768 forward": {"eager": 75e-6, "triton": 30e-6, "Liger-Kernel": 36e-6},
    "bfloat16 gpt2 16x1024 step": {"eager": 40e-3, "triton": 30e-3, "nanoGPT": 42e-3, "Hugging Face": 60e-3},
}
ATTENTION = [(64, 512), (64, 1024), (64, 2048), (64, 4096), (64, 8192), (128, 1024), (128, 4096)]
FFN = [(16384, 768), (8192, 1600), (1024, 1600)]


def noise(*key) -> float:
    """Within 3 % of 1, the same for the same key."""
    return 1 + 0.03 * (zlib.crc32(repr(key).encode()) % 2001 - 1000) / 1000


def spread(median: float) -> dict:
    return {"p20": median * 0.985, "median": median, "p80": median * 1.025}


def row(suite, case, mode, provider, dims, **more) -> dict:
    key = {"suite": suite, "case": case, "mode": mode, "provider": provider}
    return key | {"dtype": case.split()[0], "dims": dims} | more


def operator(suite, case, mode, provider, dims, slowness, flops, moved, memory) -> dict:
    """A row whose time is `slowness` times the roofline's."""
    dtype = case.split()[0]
    least = max(moved / COPY, flops / MATRIX[dtype])
    seconds = least * slowness * noise(suite, case, mode, provider)
    seconds = SECONDS.get(f"{case} {mode}", {}).get(provider, seconds)
    return row(
        *(suite, case, mode, provider, dims),
        seconds=spread(seconds),
        host_seconds=spread(2.1e-5 * noise(provider)),
        error={"bfloat16": 3.1e-3, "float32": 2.4e-7}[dtype] * noise(case, provider),
        peak_bytes=int(memory),
        flops=int(flops),
        bytes=int(moved),
        flops_per_second=flops / seconds,
        bytes_per_second=moved / seconds,
        matrix_share=flops / seconds / MATRIX[dtype],
        copy_share=moved / seconds / COPY,
        roofline_seconds=least,
    )


def layer_norm() -> list[dict]:
    rows = []
    slowness = {
        "forward": {"eager": 1.6, "eager compiled": 1.25, "triton": 1.1, "Liger-Kernel": 1.3},
        "backward": {"eager": 2.6, "eager compiled": 1.5, "triton": 1.45, "Liger-Kernel": 1.7},
    }
    for case, N, C in [
        ("bfloat16 32768x768", 32768, 768),
        ("bfloat16 8192x1600", 8192, 1600),
        ("bfloat16 512x4096", 512, 4096),
        ("float32 8192x1600", 8192, 1600),
    ]:
        for mode, providers in slowness.items():
            tensors, nbytes = 2 if mode == "forward" else 3, N * C * SIZES[case.split()[0]]
            for provider, factor in providers.items():
                is_triton = provider == "triton"
                factor *= 1.9 if N == 512 and is_triton else 1  # a loss
                costs = 8 * tensors * N * C, tensors * nbytes, nbytes * (1 if is_triton else 1.5)
                rows.append(operator("layer_norm", case, mode, provider, {"N": N, "C": C}, factor, *costs))
    return rows


def gelu_ffn() -> list[dict]:
    rows = []
    slowness = {"eager": 1.35, "eager compiled": 1.3, "triton": 1.28, "_addmm_activation": 1.15}
    for N, C in FFN:
        for mode, passes in (("forward", 1), ("both", 3)):
            for provider, factor in slowness.items():
                if mode == "both" and provider == "_addmm_activation":
                    continue
                is_triton = provider == "triton"
                factor = 1.55 if N == 1024 and is_triton else factor
                flops, moved = 16 * N * C * C * passes, passes * (20 * N * C + 16 * C * C)
                costs = flops, moved, N * C * 2 * (4 if is_triton else 9) * passes
                rows.append(operator("gelu_ffn", f"bfloat16 {N}x{C}", mode, provider, {"N": N, "C": C}, factor, *costs))
    return rows


def attention() -> list[dict]:
    rows = []
    slowness = {"eager": 9.0, "triton": 1.75, "SDPA FlashAttention-2": 1.9, "SDPA cuDNN": 1.4, "FlexAttention": 2.1}
    for D, T in ATTENTION:
        B, H = 16384 // T, 1024 // D
        case, dims = f"bfloat16 {B}x{H}x{T}x{D}", {"B": B, "H": H, "T": T, "D": D}
        for mode, products, tensors in (("forward", 2, 4), ("backward", 5, 8)):
            for provider, factor in slowness.items():
                if provider == "eager" and T == 8192:
                    continue
                moved = tensors * B * H * T * D * 2
                memory = B * H * T * T * 6 if provider == "eager" else moved / 4 + B * H * T * 4
                costs = products * B * H * T * T * D, moved, memory
                rows.append(operator("causal_attention", case, mode, provider, dims, factor * (1 + 700 / T), *costs))
    return rows


def training(sizes, peak: float | None, speed: float = 1.0, dtype: str = "bfloat16") -> list[dict]:
    rows = []
    slowness = {"eager": 1.0, "triton": 0.78, "nanoGPT": 1.02}
    slowness |= {"triton compiled": 0.7, "eager compiled": 0.74, "Hugging Face": 1.31}  # in the first case only
    for B, T in sizes:
        case = f"{dtype} gpt2 {B}x{T}"
        for provider in list(slowness)[: 6 if sizes[0] == (B, T) else 3]:
            factor = 1.12 if B == 1 and provider == "triton" else slowness[provider]  # a loss
            flops, causal = (6 * 124e6 + scores * 12 * 768 * T for scores in (12, 6))
            tokens = 420e3 * speed / factor * 744e6 / flops * noise(case, provider) / (1 + 1500 / (B * T))
            seconds = B * T / tokens
            if peak is not None:
                seconds = SECONDS.get(f"{case} step", {}).get(provider, seconds)
            tokens = B * T / seconds
            rows.append(
                row(
                    *("training", case, "step", provider, {"B": B, "T": T, "model": "gpt2"}),
                    seconds=spread(seconds),
                    peak_bytes=int(2.1e9 + B * T * (9e5 if provider.startswith("eager") else 6.5e5)),
                    tokens_per_second=tokens,
                    mfu=None if peak is None else tokens * flops / peak,
                    mfu_causal=None if peak is None else tokens * causal / peak,
                )
            )
    return rows


def generation() -> list[dict]:
    rows = []
    for B, P in [(1, 128), (8, 512)]:
        case, dims = f"bfloat16 gpt2 {B}x{P}+256", {"B": B, "P": P, "N": 256, "model": "gpt2"}
        for provider, factor in {"eager": 1.0, "triton": 1.05, "nanoGPT": 4.1, "Hugging Face": 2.2}.items():
            per_token = 2.1e-3 * factor * noise(case, provider)
            rows.append(
                row(
                    *("generation", case, "generate", provider, dims),
                    seconds=spread(256 * per_token + 5e-3),
                    tokens_per_second=B / per_token,
                    seconds_to_first_token=5e-3 * factor,
                    seconds_per_token=per_token,
                    bytes_per_token=int(2.5e8 + 3e7 * B),
                    mbu=(2.5e8 + 3e7 * B) / per_token / COPY,
                    peak_bytes=int(3e8 + 4e7 * B),
                )
            )
    return rows


def missing(suite: str, case: str, mode: str, provider: str, reason: str) -> dict:
    return {"suite": suite, "case": case, "mode": mode, "provider": provider, "reason": reason}


def write(folder: Path) -> None:
    """Write the files of three devices: fixture-gpu has two, the others one."""

    def file(name: str, machine: dict, day: int, rows: list[dict], not_measured: list[dict], commit="b", dirty=False):
        content = {
            "gptfast_results": 1,
            "machine_info": {"gptfast": machine},
            "commit_info": {"id": commit * 40, "dirty": dirty},
            "datetime": f"2001-02-{day:02}T04:05:06+00:00",
            "benchmarks": [{"extra_info": row} for row in rows],
            "not_measured": not_measured,
        }
        path = folder / machine["slug"] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")

    # the newer file replaces the older one's row of layer norm, and has what the older one lacks
    older = layer_norm()[0] | {"seconds": spread(1.0)}
    found = missing("layer_norm", "bfloat16 32768x768", "forward", "triton", "never shown: the newer file has it")
    steps = training([(16, 1024), (1, 1024), (4, 1024), (16, 256), (16, 512), (16, 2048)], 1000e12)
    file("models.json", GPU, 3, [older, *steps, *generation()], [found], commit="a", dirty=True)
    memory = "out of memory: it needs 48 GiB | 40 GiB are free"
    absent = [missing("causal_attention", "bfloat16 2x16x8192x64", m, "eager", memory) for m in ("forward", "backward")]
    absent += [
        missing("gelu_ffn", f"bfloat16 {N}x{C}", "both", "_addmm_activation", "it has no backward") for N, C in FFN
    ]
    file("operators.json", GPU, 4, [*layer_norm(), *gelu_ffn(), *attention()], absent)
    few = [row | {"host_seconds": None, "error": None, "peak_bytes": None} for row in layer_norm()[:8]]
    file("all.json", UNKNOWN_GPU, 5, [*training([(16, 1024)], None, 0.3), *few], [])
    steps = training([(12, 64)], None, 0.05, "float32")
    steps = [row | {"provider": row["provider"].replace("triton", "cpu"), "peak_bytes": None} for row in steps]
    reason = "Triton kernels are measured on CUDA devices; none was found"
    absent = [
        missing("layer_norm", f"float32 {N}x768", mode, "triton", reason)
        for N in (256, 1024)
        for mode in ("forward", "backward")
    ]
    file("all.json", CPU, 5, steps, absent)
