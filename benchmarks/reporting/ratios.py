"""Ratios of median times between providers of the same case, mode and file.

Measurements of different files were not taken in turns, and a machine's speed changes from hour to hour: they have no
ratio.
"""

from __future__ import annotations

from pandas import DataFrame

from benchmarks.reporting.names import MAIN, MODEL_SUITES, OWN

BEST_PEER = "best peer"
_CASE = ["suite", "case", "mode", "source"]


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
    others = rows.drop(own(rows).index)
    return others[others["provider"] != baseline(rows)]


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
