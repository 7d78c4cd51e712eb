"""Ratios of median times between providers of the same case, mode and file.

Measurements of different files were not taken in turns, and a machine's speed changes from hour to hour: they have no
ratio.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pandas import DataFrame

MODEL_SUITES = ("training", "generation")
SUITES = {
    "training": "Training step",
    "generation": "Generation",
    "layer_norm": "Layer norm",
    "add_layer_norm": "Residual addition and layer norm",
    "gelu_ffn": "GELU feed-forward",
    "ffn_up": "Linear and ReLU",
    "causal_attention": "Causal attention",
    "causal_attention_qkvpacked": "Causal attention, packed QKV",
    "decode_attention": "Decode attention",
    "int8_linear": "Int8 linear layer",
    "linear_cross_entropy": "Linear and cross-entropy",
}
MODES = {name: name for name in ("step", "generate", "forward", "backward")} | {"both": "forward + backward"}
MAIN = ("triton", "cpu")  # gptfast's backends that figures highlight; "eager" is plain PyTorch
OWN = tuple(
    f"{backend} {kind}".strip()
    for backend in (*MAIN, "eager")
    for kind in ("", "fused", "unfused", "captured", "compiled", "compiled captured", "int8")
)
BEST_PEER = "best peer"
KEY = ["suite", "case", "mode", "provider"]
_CASE = ["suite", "case", "mode", "source"]


def title(suite: str, mode: str) -> str:
    """Title of a suite's mode; a model suite has only one."""
    return SUITES.get(suite, suite) + ("" if suite in MODEL_SUITES else f", {MODES.get(mode, mode)}")


def sort_order(row: dict[str, Any]) -> tuple:
    """Sort key of the report: suite, mode, dtype, sizes, then gptfast's providers and the peers.

    The last size counts first: the head size or the model, before sequence length and batch.
    """
    sizes = tuple((name, isinstance(size, str), size) for name, size in reversed(row["dims"].items()))
    places = _place(row["suite"], SUITES), _place(row["mode"], MODES)
    return *places, row["dtype"], sizes, row["case"], provider_order(row["provider"])


def provider_order(provider: str) -> tuple[int, str]:
    """Sort key of providers: gptfast's backends in their order, then the others by name."""
    return _place(provider, OWN)


def _place(name: str, known: Iterable[str]) -> tuple[int, str]:
    names = list(known)
    return names.index(name) if name in names else len(names), name


def main_provider(rows: DataFrame) -> str:
    """Backend that represents gptfast: the first of triton, cpu and eager that was measured."""
    return _first_measured(rows, *MAIN, "eager")


def baseline(rows: DataFrame) -> str:
    """Provider that all others are compared with: eager, or cpu where eager was not measured."""
    return _first_measured(rows, "eager", "cpu")


def _first_measured(rows: DataFrame, *providers: str) -> str:
    return next((name for name in providers if (rows["provider"] == name).any()), "eager")


def own(rows: DataFrame) -> DataFrame:
    """Rows of gptfast's providers: every backend of a model, and every operator's but plain PyTorch's."""
    plain = rows["provider"].str.startswith("eager") & ~rows["suite"].isin(MODEL_SUITES)
    return rows[rows["provider"].isin(OWN) & ~plain]


def peers(rows: DataFrame) -> DataFrame:
    """Rows of providers that are neither gptfast's nor the baseline."""
    return rows.drop(own(rows).index).pipe(lambda other: other[other["provider"] != baseline(rows)])


def of_provider(rows: DataFrame, provider: str) -> DataFrame:
    """Rows of one provider."""
    return rows[rows["provider"] == provider]


def add_ratios(rows: DataFrame, others: DataFrame) -> DataFrame:
    """Join to each row the ratio to the row of the same case in `others`, which has at most one.

    Returns:
        `rows` with `ratio` (the other's median over this one's, above 1 is faster), its bounds `low` and `high` by p20
        and p80, and `other`, the other's provider. NaN where the case has no other.
    """
    theirs = rows[_CASE].merge(others, how="left", on=_CASE).set_index(rows.index)
    return rows.assign(
        ratio=theirs["median"] / rows["median"],
        low=theirs["p20"] / rows["p80"],
        high=theirs["p80"] / rows["p20"],
        other=theirs["provider"],
    )


def against_each(rows: DataFrame, suite: DataFrame) -> DataFrame:
    """Ratios of `rows` to the baseline and the peers of their suite, one column for each that was measured."""
    others = [baseline(suite), *sorted(peers(suite)["provider"].unique())]
    ratios = {other: add_ratios(rows, of_provider(suite, other))["ratio"] for other in others}
    found = DataFrame({other: ratio.mask(rows["provider"] == other) for other, ratio in ratios.items()}, rows.index)
    return found.dropna(axis="columns", how="all")


def summaries(rows: DataFrame, provider: str) -> dict[str, DataFrame]:
    """Rows of `provider` with ratios, in one suite and mode, to the baseline and to the best peer of each case."""
    ours, base, others = of_provider(rows, provider), baseline(rows), peers(rows)
    best = others.loc[others.groupby(_CASE)["median"].idxmin()]
    ratios = {base: add_ratios(ours, of_provider(rows, base)), BEST_PEER: add_ratios(ours, best)}
    return {name: found.dropna(subset="ratio") for name, found in ratios.items() if found["ratio"].notna().any()}
