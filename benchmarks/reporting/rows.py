"""What a results file says, as dataclasses: rows, the machine they were measured on, the file they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

MODEL_SUITES = ("training", "generation")
SUITES = {
    "training": "Training step",
    "generation": "Generation",
    "layer_norm": "Layer norm",
    "add_layer_norm": "Residual addition and layer norm",
    "gelu_ffn": "GELU feed-forward",
    "ffn_up": "Product with ReLU",
    "causal_attention": "Causal attention",
    "causal_attention_qkvpacked": "Causal attention of packed projections",
    "decode_attention": "Decode attention",
    "int8_linear": "Linear layer with weights of 8 bits",
    "linear_cross_entropy": "Linear layer and cross-entropy",
}
MODES = {
    "step": "step",
    "generate": "generate",
    "forward": "forward",
    "backward": "backward",
    "both": "forward + backward",
}
BASELINE = "eager"
# gptfast's own; of an operator's only the Triton ones are, "eager" is then plain PyTorch
OWN = (
    "triton",
    "triton fused",
    "triton unfused",
    "triton captured",
    "triton compiled",
    "triton compiled captured",
    "triton int8",
    "eager",
    "eager compiled",
    "eager int8",
)

Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Spread:
    """Median of several times with their 20th and 80th percentile, in seconds."""

    p20: float
    median: float
    p80: float


@dataclass(frozen=True)
class Peak:
    """A GPU's data sheet; `name` is None for a GPU that is not in the table."""

    name: str | None
    flops: Mapping[str, float]
    bandwidth: float | None
    source: str | None


@dataclass(frozen=True)
class Machine:
    """Device and versions of a run, and the limits measured at its beginning."""

    device: str
    slug: str
    kind: str
    torch: str
    gptfast: str
    python: str
    threads: int
    copy_bytes_per_second: float
    matrix_flops_per_second: Mapping[str, float]
    peak: Peak
    peers: Mapping[str, str | None]
    driver: str | None = None
    cuda: str | None = None
    triton: str | None = None


@dataclass(frozen=True)
class Source:
    """A results file: where it lies, which code it measured and when."""

    path: str
    commit: str
    dirty: bool
    when: datetime
    machine: Machine


@dataclass(frozen=True)
class Row:
    """One measurement: a provider's time for a case, and what follows from it. What does not apply is None."""

    suite: str
    case: str
    mode: str
    provider: str
    dtype: str
    dims: dict[str, int | str]
    seconds: Spread
    source: Source
    host_seconds: Spread | None = None
    error: float | None = None
    peak_bytes: float | None = None
    flops: float | None = None
    bytes: float | None = None
    flops_per_second: float | None = None
    bytes_per_second: float | None = None
    matrix_share: float | None = None
    copy_share: float | None = None
    roofline_seconds: float | None = None
    tokens_per_second: float | None = None
    flops_per_token: float | None = None
    flops_per_token_causal: float | None = None
    mfu: float | None = None
    mfu_causal: float | None = None
    seconds_to_first_token: float | None = None
    seconds_per_token: float | None = None
    bytes_per_token: float | None = None
    mbu: float | None = None

    @property
    def key(self) -> Key:
        """What makes two measurements the same one, taken again."""
        return self.suite, self.case, self.mode, self.provider


@dataclass(frozen=True)
class NotMeasured:
    """A measurement that a file lacks, and why."""

    suite: str
    case: str
    mode: str
    provider: str
    reason: str

    @property
    def key(self) -> Key:
        """As `Row.key`."""
        return self.suite, self.case, self.mode, self.provider


@dataclass(frozen=True)
class Run:
    """All that is known of one device. `problems` are the files of its folder that could not be used, one line each."""

    machine: Machine
    sources: tuple[Source, ...]
    rows: tuple[Row, ...]
    not_measured: tuple[NotMeasured, ...]
    problems: tuple[str, ...] = ()

    @property
    def newest(self) -> Source:
        """The file that was measured last, of those that have rows if some do: others may lie beside them."""
        used = {row.source.path for row in self.rows}
        return next((source for source in reversed(self.sources) if source.path in used), self.sources[-1])


def row_order(row: Row) -> tuple:
    """Sorts rows as tables list them: by suite, mode, dtype, sizes, then gptfast, plain PyTorch and the peers.

    Of the sizes the last one counts first: a head's or a model's, before the sequence length and the batch.
    """
    sizes = tuple((name, isinstance(size, str), size) for name, size in reversed(row.dims.items()))
    return (
        *(_position(row.suite, SUITES), _position(row.mode, MODES)),
        *(row.dtype, sizes, row.case, provider_order(row.provider)),
    )


def provider_order(provider: str) -> tuple[int, str]:
    """Sorts providers: gptfast's own in their order, then the others by name."""
    return _position(provider, OWN)


def _position(name: str, known: Mapping[str, str] | tuple[str, ...]) -> tuple[int, str]:
    names = list(known)
    return (names.index(name) if name in names else len(names)), name
