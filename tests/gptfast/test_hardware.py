import re

import pytest
import torch

from gptfast import hardware

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

# dense 16-bit peak in TFLOP/s, memory bandwidth in GB/s, and PyTorch's names, which older drivers shorten
ROWS = {
    "V100 SXM2 16GB": (125, 900, "Tesla V100-SXM2-16GB"), "V100 SXM2 32GB": (125, 900, "Tesla V100-SXM2-32GB"),
    "V100 PCIe 16GB": (112, 900, "Tesla V100-PCIE-16GB"), "V100 PCIe 32GB": (112, 900, "Tesla V100-PCIE-32GB"),
    "T4": (65, 320, "Tesla T4"), "A10": (125, 600, "NVIDIA A10"), "L4": (121, 300, "NVIDIA L4"),
    "L40S": (362.05, 864, "NVIDIA L40S"), "A100 SXM 40GB": (312, 1555, "NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
    "A100 SXM 80GB": (312, 2039, "NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM-80GB"),
    "A100 PCIe 40GB": (312, 1555, "NVIDIA A100-PCIE-40GB"), "A100 PCIe 80GB": (312, 1935, "NVIDIA A100 80GB PCIe"),
    "RTX 3090": (71, 936, "NVIDIA GeForce RTX 3090", "GeForce RTX 3090"),
    "RTX 4090": (165.2, 1008, "NVIDIA GeForce RTX 4090"), "RTX 5090": (209.5, 1792, "NVIDIA GeForce RTX 5090"),
    "H100 SXM": (989.4, 3350, "NVIDIA H100 80GB HBM3"), "H100 PCIe": (756, 2039, "NVIDIA H100 PCIe"),
    "H100 NVL": (835.5, 3938, "NVIDIA H100 NVL"), "H20": (148, 4000, "NVIDIA H20"),
    "H200 SXM": (989.4, 4800, "NVIDIA H200"), "H200 NVL": (835.5, 4800, "NVIDIA H200 NVL"),
    "B200": (2250, 7700, "NVIDIA B200"), "MI300X": (1307.4, 5300, "AMD Instinct MI300X", "AMD Instinct MI300X OAM"),
}  # fmt: skip
OTHERS = [
    "NVIDIA RTX A1000", "NVIDIA A100X", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA H200 MIG 1g.18gb", "NVIDIA A100", "NVIDIA A10G", "NVIDIA A10-24Q", "NVIDIA A40", "NVIDIA L40",
    "Tesla V100-SXM2-32GB-LS", "Tesla V100S-PCIE-32GB", "Tesla V100-FHHL-16GB", "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 5090 D", "NVIDIA GB200",
    "NVIDIA GH200 480GB", "NVIDIA H20-3e", "NVIDIA H800", "NVIDIA B300", "NVIDIA", "GeForce", "",
]  # fmt: skip
# processors, clock in GHz of the data sheet, and FLOPs per cycle of a processor's matrix units by CUDA's tables.
# The H20 is limited to less than its clock allows.
RATES = {
    **dict.fromkeys(("V100 SXM2 16GB", "V100 SXM2 32GB"), (80, 1.53, 1024)),
    **dict.fromkeys(("V100 PCIe 16GB", "V100 PCIe 32GB"), (80, 1.37, 1024)),
    **dict.fromkeys(("A100 SXM 40GB", "A100 PCIe 40GB", "A100 SXM 80GB", "A100 PCIe 80GB"), (108, 1.41, 2048)),
    "T4": (40, 1.59, 1024), "A10": (72, 1.695, 1024), "L4": (58, 2.04, 1024), "L40S": (142, 2.49, 1024),
    "RTX 3090": (82, 1.695, 512), "RTX 4090": (128, 2.52, 512), "RTX 5090": (170, 2.407, 512),
    **dict.fromkeys(("H100 SXM", "H200 SXM"), (132, 1.83, 4096)), "H100 PCIe": (114, 1.62, 4096),
    **dict.fromkeys(("H100 NVL", "H200 NVL"), (132, 1.545, 4096)), "B200": (148, 1.86, 8192),
    "MI300X": (304, 2.1, 2048),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch):
    monkeypatch.delenv("GPTFAST_PEAK_FLOPS", raising=False)
    monkeypatch.delenv("GPTFAST_PEAK_BANDWIDTH", raising=False)


@pytest.fixture
def fp32_precision():
    """Restores PyTorch's setting for float32 matmuls."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def set_device_name(monkeypatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)


@pytest.mark.parametrize("row", ROWS)
def test_find_knows_a_gpu_by_its_names(row, monkeypatch):
    flops, bandwidth, *names = ROWS[row]
    for name in names:
        assert hardware.find(name).name == row
        set_device_name(monkeypatch, name)
        assert hardware.peak_flops(CUDA, torch.float16) == flops * 1e12
        assert hardware.peak_bandwidth(CUDA) == bandwidth * 1e9


@pytest.mark.parametrize("name", OTHERS)
def test_find_does_not_guess(name, monkeypatch):
    assert hardware.find(name) is None
    set_device_name(monkeypatch, name)
    assert hardware.peak_flops(CUDA, torch.bfloat16) is None
    assert hardware.peak_bandwidth(CUDA) is None


def test_table_has_a_row_for_every_gpu():
    assert all(hardware.find(name) is gpu for gpu in hardware.GPUS for name in gpu.names)
    assert sorted(ROWS) == sorted(gpu.name for gpu in hardware.GPUS)


@pytest.mark.parametrize("gpu", hardware.GPUS, ids=lambda gpu: gpu.name)
def test_table_rows_have_plausible_units_and_ratios(gpu):
    """Each check finds a wrong factor of two or a thousand."""
    flops = gpu.flops
    assert flops.keys() <= {"bfloat16", "float16", "tf32", "float32", "float8"}
    assert {"float16", "float32"} <= flops.keys()
    assert all(8e12 <= figure <= 5e15 for figure in flops.values())
    assert 300e9 <= gpu.bandwidth <= 8e12
    assert re.search(r"data sheet|white paper", gpu.source)
    modern = not gpu.name.startswith(("V100", "T4"))
    assert ("bfloat16" in flops) == ("tf32" in flops) == modern
    assert ("float8" in flops) == (modern and not gpu.name.startswith(("A10", "A100", "RTX 3090")))
    if modern:
        assert flops["bfloat16"] == flops["float16"]
        assert flops["tf32"] == pytest.approx(flops["bfloat16"] / 2, rel=0.03)
    if "float8" in flops:
        assert flops["float8"] == pytest.approx(2 * flops["bfloat16"], rel=0.03)


def test_table_figures_are_dense_and_accumulate_in_float32():
    """With sparsity, or float16 accumulation on a GeForce, a processor would do twice as much per cycle."""
    assert RATES.keys() == ROWS.keys() - {"H20"}
    for row, (processors, clock, per_cycle) in RATES.items():
        assert ROWS[row][0] * 1e3 == pytest.approx(processors * clock * per_cycle, rel=0.01), row


@pytest.mark.parametrize(
    ("name", "precision", "dtype", "flops"),
    [
        ("NVIDIA H200", "ieee", torch.bfloat16, 989.4e12),
        ("NVIDIA H200", "ieee", torch.float8_e4m3fn, 1978.9e12),
        ("NVIDIA H200", "ieee", torch.float8_e5m2, 1978.9e12),
        ("NVIDIA H200", "ieee", torch.float32, 66.9e12),
        ("NVIDIA H200", "ieee", torch.float64, None),
        ("NVIDIA H200", "tf32", torch.float32, 494.7e12),
        ("NVIDIA H200", "tf32", torch.bfloat16, 989.4e12),
        ("Tesla V100-SXM2-16GB", "tf32", torch.float32, 15.7e12),
        ("NVIDIA A100-SXM4-80GB", "ieee", torch.float8_e4m3fn, None),
        ("Tesla T4", "ieee", torch.bfloat16, None),
    ],
)
def test_peak_flops_by_dtype_and_precision(monkeypatch, fp32_precision, name, precision, dtype, flops):
    set_device_name(monkeypatch, name)
    torch.backends.cuda.matmul.fp32_precision = precision
    assert hardware.peak_flops(CUDA, dtype) == flops


@pytest.mark.parametrize("kind", ["meta", "mps"])
def test_peaks_of_other_devices_are_unknown(kind):
    assert hardware.peak_flops(torch.device(kind), torch.float32) is None
    assert hardware.peak_bandwidth(torch.device(kind)) is None


def test_peaks_of_the_cpu_are_measured_once(monkeypatch):
    hardware._measured_cpu_flops.cache_clear()
    hardware._measured_cpu_bandwidth.cache_clear()
    state = torch.get_rng_state()
    flops, bandwidth = hardware.peak_flops(CPU, torch.float32), hardware.peak_bandwidth(CPU)
    assert torch.equal(torch.get_rng_state(), state), "training draws from the global generator"
    assert 1e9 < flops < 1e14
    assert 1e8 < bandwidth < 1e13
    monkeypatch.setattr(hardware.time, "perf_counter", None)
    assert (hardware.peak_flops(CPU, torch.float32), hardware.peak_bandwidth(CPU)) == (flops, bandwidth)


def test_peaks_of_the_cpu_count_flops_and_bytes(monkeypatch):
    """A fake clock makes every matmul and every copy take two seconds."""
    monkeypatch.setattr(hardware.time, "perf_counter", iter(range(0, 1000, 2)).__next__)
    assert hardware._measured_cpu_flops.__wrapped__(torch.float32, size=10) == 2 * 10 * 10 * 10 / 2
    assert hardware._measured_cpu_bandwidth.__wrapped__(size=1000) == (1000 + 1000) / 2


@pytest.mark.parametrize("name", ["NVIDIA Foo", "NVIDIA H200"])
def test_override_wins(name, monkeypatch):
    set_device_name(monkeypatch, name)
    monkeypatch.setenv("GPTFAST_PEAK_FLOPS", "123e12")
    monkeypatch.setenv("GPTFAST_PEAK_BANDWIDTH", "1.5e12")
    for device in (CUDA, CPU, torch.device("mps")):
        assert hardware.peak_flops(device, torch.bfloat16) == 123e12
        assert hardware.peak_bandwidth(device) == 1.5e12


@pytest.mark.parametrize("value", ["fast", "", "0", "-1e12", "nan", "inf", "989 TFLOP/s"])
@pytest.mark.parametrize("variable", ["GPTFAST_PEAK_FLOPS", "GPTFAST_PEAK_BANDWIDTH"])
def test_override_must_be_a_positive_finite_number(variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"{variable} is {value!r}"):
        hardware.describe(CPU)


UNKNOWN = "unknown GPU 'NVIDIA Foo'"
SOURCE = "NVIDIA H200 data sheet, dense = half of the figures with sparsity"


@pytest.mark.parametrize(
    ("name", "flops", "bandwidth", "description"),
    [
        ("NVIDIA H200", None, None, f"H200 SXM: 989 TFLOP/s bf16, 4.8 TB/s ({SOURCE})"),
        ("NVIDIA H200", "500e12", None, f"H200 SXM: 500 TFLOP/s (GPTFAST_PEAK_FLOPS), 4.8 TB/s ({SOURCE})"),
        ("Tesla V100-SXM2-16GB", None, None, "V100 SXM2 16GB: 125 TFLOP/s fp16, 900 GB/s (NVIDIA V100 data sheet)"),
        ("NVIDIA B200", None, None, "B200: 2.25 PFLOP/s bf16, 7.7 TB/s ("),
        ("NVIDIA Foo", None, None, f"{UNKNOWN}: no peak, set GPTFAST_PEAK_FLOPS and GPTFAST_PEAK_BANDWIDTH"),
        (
            "NVIDIA Foo", "500e12", None,
            f"{UNKNOWN}: 500 TFLOP/s (GPTFAST_PEAK_FLOPS), no bandwidth (set GPTFAST_PEAK_BANDWIDTH)",
        ),
        (
            "NVIDIA Foo", "500e12", "999.9e9",
            f"{UNKNOWN}: 500 TFLOP/s (GPTFAST_PEAK_FLOPS), 1 TB/s (GPTFAST_PEAK_BANDWIDTH)",
        ),
        ("NVIDIA Foo", None, "1e12", f"{UNKNOWN}: no peak (set GPTFAST_PEAK_FLOPS), 1 TB/s (GPTFAST_PEAK_BANDWIDTH)"),
    ],
)  # fmt: skip
def test_describe_gives_peaks_and_their_source(monkeypatch, name, flops, bandwidth, description):
    set_device_name(monkeypatch, name)
    for variable, value in (("GPTFAST_PEAK_FLOPS", flops), ("GPTFAST_PEAK_BANDWIDTH", bandwidth)):
        if value is not None:
            monkeypatch.setenv(variable, value)
    assert hardware.describe(CUDA).startswith(description)


def test_describe_other_devices():
    assert re.fullmatch(r"CPU: [\d.]+ [PTG]FLOP/s fp32, [\d.]+ [TG]B/s \(measured\)", hardware.describe(CPU))
    assert hardware.describe(torch.device("mps")).startswith("unknown device 'mps': no peak, set GPTFAST_PEAK_FLOPS")
