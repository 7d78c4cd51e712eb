"""How providers stand to each other: ratios of median times, always of the same case, mode and run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.reporting.rows import BASELINE, MODEL_SUITES, OWN, Row, Run, provider_order

BEST_PEER = "best peer"

Case = tuple[str, str, str, str]


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as `other` a row is. `low` and `high` come from both rows' p20 and p80."""

    row: Row
    other: Row

    @property
    def value(self) -> float:
        """The ratio of the medians."""
        return self.other.seconds.median / self.row.seconds.median

    @property
    def low(self) -> float:
        """The other at its p20 over this one at its p80: the least that the spread allows."""
        return self.other.seconds.p20 / self.row.seconds.p80

    @property
    def high(self) -> float:
        """The other at its p80 over this one at its p20: the most that the spread allows."""
        return self.other.seconds.p80 / self.row.seconds.p20


@dataclass(frozen=True)
class Standing:
    """Ratios of a provider over all cases of a suite and mode against one other."""

    against: str
    ratios: tuple[Ratio, ...]

    @property
    def best(self) -> Ratio:
        """The case where it does best."""
        return max(self.ratios, key=lambda ratio: ratio.value)

    @property
    def worst(self) -> Ratio:
        """The case where it does worst."""
        return min(self.ratios, key=lambda ratio: ratio.value)


def cases(rows: Iterable[Row]) -> dict[Case, dict[str, Row]]:
    """Rows by suite, case, mode and file, then by provider; in the order of the rows.

    By file, because what was not measured in turn is not compared: machines differ from one hour to the next.
    """
    grouped: dict[Case, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        grouped[row.suite, row.case, row.mode, row.source.path][row.provider] = row
    return dict(grouped)


def speed_ups(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], Ratio]:
    """Of each row that has a baseline, by its key: the ratio against eager."""
    return {
        row.key: Ratio(row, providers[BASELINE])
        for providers in cases(rows).values()
        if BASELINE in providers
        for row in providers.values()
    }


def own(suite: str) -> tuple[str, ...]:
    """Which providers are gptfast's: of a model all backends, of an operator the Triton ones."""
    return OWN if suite in MODEL_SUITES else tuple(name for name in OWN if name.startswith("triton"))


def is_peer(suite: str, provider: str) -> bool:
    """Whether a provider is one to measure up to: neither gptfast's nor the plain baseline."""
    return provider not in own(suite) and provider != BASELINE


def best_peer(providers: dict[str, Row]) -> Row | None:
    """The fastest peer of one case."""
    peers = [row for row in providers.values() if is_peer(row.suite, row.provider)]
    return min(peers, key=lambda row: row.seconds.median, default=None)


def standings(rows: Iterable[Row], provider: str) -> list[Standing]:
    """`provider`, over the cases of one suite and mode, against eager and against the best peer of each case."""
    against: dict[str, list[Ratio]] = {BASELINE: [], BEST_PEER: []}
    for providers in cases(rows).values():
        if (row := providers.get(provider)) is None:
            continue
        for name, other in ((BASELINE, providers.get(BASELINE)), (BEST_PEER, best_peer(providers))):
            if other is not None:
                against[name].append(Ratio(row, other))
    return [Standing(name, tuple(found)) for name, found in against.items() if found]


def champion(run: Run) -> str:
    """The provider that stands for gptfast: triton where it was measured, else eager."""
    return "triton" if any(row.provider == "triton" for row in run.rows) else BASELINE


def model_peers(run: Run, suite: str) -> list[str]:
    """The providers of a model suite that are not gptfast's."""
    return sorted({row.provider for row in run.rows if row.suite == suite} - set(own(suite)), key=provider_order)
