import itertools
import re
from xml.etree import ElementTree

import pytest

from benchmarks.reporting import figures, plotting, results
from benchmarks.reporting.figures import Figure
from benchmarks.reporting.units import TIMES

SVG = "{http://www.w3.org/2000/svg}"


def all_figures(folder) -> list[Figure]:
    run = results.load(folder)
    return [figure for suite in run.rows["suite"].unique() for figure in figures.figures(run, suite)]


@pytest.fixture(scope="module")
def drawn(gpu_folder) -> dict[str, Figure]:
    return {figure.name.removeprefix("fixture-gpu-"): figure for figure in all_figures(gpu_folder)}


def texts(figure: Figure) -> list[str]:
    return ["".join(found.itertext()) for found in ElementTree.fromstring(figure.svg).iter(f"{SVG}text")]


def test_figures_of_every_suite(drawn):
    operators = [("layer_norm", "backward"), ("gelu_ffn", "both"), ("causal_attention", "backward")]
    assert set(drawn) == {
        *("training-speed-up-step-1", "training-sweep-T-step", "training-sweep-B-step", "training-memory-step-1"),
        *("generation-speed-up-generate-1", "generation-memory-generate-1"),
        *("causal_attention-sweep-T-forward", "causal_attention-sweep-T-backward"),
        *(f"{suite}-roofline" for suite, _ in operators),
        *(f"{suite}-speed-up-{mode}-1" for suite, other in operators for mode in ("forward", other)),
        *(f"{suite}-memory-{mode}-1" for suite, other in operators for mode in ("forward", other)),
    }


def test_speed_ups_show_wins_and_losses(drawn):
    """75 us of eager over 30 us of triton is 2.50; in the small case triton is slower."""
    figure = drawn["layer_norm-speed-up-forward-1"]
    shown = texts(figure)
    assert {f"2.50{TIMES}", f"0.78{TIMES} slower", "bfloat16 512x4096", "triton"} <= set(shown)
    assert "eager" not in shown, "the baseline is the line at 1"
    for name in ("own", "own-loss", "peer"):
        assert f"var(--{name}, " in figure.svg, name
    peers = drawn["training-speed-up-step-1"]
    assert f"0.67{TIMES} slower" in texts(peers), "40 ms of eager over 60 ms of Hugging Face"
    assert "var(--peer-loss, " in peers.svg


def test_memory_shows_sizes(drawn):
    assert {"48.0 MiB", "72.0 MiB"} <= set(texts(drawn["layer_norm-memory-forward-1"]))


def test_roofline_has_limits_and_all_providers(drawn):
    assert "_addmm_activation" in texts(drawn["gelu_ffn-roofline"])
    shown = texts(drawn["layer_norm-roofline"])
    assert {"measured limits", "data sheet", "triton", "eager", "Liger-Kernel", "forward, float32"} <= set(shown)


def test_roofline_of_unknown_gpu_has_no_data_sheet(stored):
    (roofline,) = [figure for figure in all_figures(stored / "fixture-unknown") if figure.name.endswith("roofline")]
    assert "measured limits" in texts(roofline)
    assert "data sheet" not in texts(roofline)


def test_svg_ids_are_unique_and_used(drawn):
    ids = [re.findall(r'\bid="([^"]+)"', figure.svg) for figure in drawn.values()]
    assert all(ids)
    assert len(set(itertools.chain(*ids))) == sum(map(len, ids))
    for figure, own in zip(drawn.values(), ids, strict=True):
        used = re.findall(r'href="#([^"]+)"', figure.svg) + re.findall(r"url\(#([^)]+)\)", figure.svg)
        assert set(used) == set(own)


def test_svg_is_reproducible_and_takes_the_page_s_colors(drawn, gpu_folder):
    assert [figure.svg for figure in all_figures(gpu_folder)] == [figure.svg for figure in drawn.values()]
    for figure in drawn.values():
        assert "<metadata" not in figure.svg
        assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]+"', "", figure.svg)
        bare = re.sub(r"var\(--[a-z0-9-]+, #[0-9a-f]{6}\)", "", figure.svg)
        assert re.findall(r"(?:fill|stroke): ?(#[0-9a-f]+)", bare) == [], "a colour that would not turn dark"


def test_colors_of_providers_differ():
    light = [colors[0] for colors in plotting.PALETTE.values()]
    assert len(set(light)) == len(light), "the SVG finds a colour by its value"
    assert len({tuple(style.values()) for style in plotting.provider_styles("abcdefghij").values()}) == 10, (
        "not even the marker differs"
    )
    styles = plotting.provider_styles(["triton", "eager", *"abcde", "triton compiled", "eager compiled"])
    for first, second in itertools.combinations([style["color"] for style in styles.values()], 2):
        distance = sum((int(first[at : at + 2], 16) - int(second[at : at + 2], 16)) ** 2 for at in (1, 3, 5)) ** 0.5
        assert distance > 50, (first, second)


def test_cpu_is_drawn_as_gptfast():
    styles = plotting.provider_styles(["cpu", "cpu compiled", "eager"])
    assert (*styles.values(),) == (*plotting.provider_styles(["triton", "triton compiled", "eager"]).values(),)


@pytest.fixture(scope="module")
def rows(gpu_folder):
    """Rows of a suite."""
    found = results.load(gpu_folder).rows
    return lambda suite: found[found["suite"] == suite]


@pytest.mark.parametrize(("cases", "charts"), [(1, 1), (10, 1), (12, 2), (30, 3)])
def test_charts_are_split_between_cases(rows, cases, charts):
    """Four bars a case, forty a chart."""
    bars = rows("layer_norm").head(4)
    bars = bars.loc[bars.index.repeat(cases)].reset_index(drop=True)
    bars["case"] = [f"case {number // 4}" for number in range(len(bars))]
    parts = [part for _, _, part in figures.split_bars(bars)]
    assert [name for part in parts for name in part["case"]] == list(bars["case"])
    assert len(parts) == charts
    assert all(len(part) % 4 == 0 and len(part) <= 44 for part in parts)


def lines(rows, axis: str) -> dict[str, dict[str, list[int]]]:
    found = figures.sweeps(rows, axis)
    return {
        title: panel.sort_values("size").groupby("provider")["size"].apply(list).to_dict()
        for title, panel in found.groupby("panel", sort=False)
    }


def test_sweeps_fix_all_other_sizes(rows):
    """Training varies T at one batch; attention varies T at one number of tokens, by head size."""
    by_length = lines(rows("training"), "T")
    assert list(by_length) == ["B = 16, gpt2, bfloat16"]
    assert by_length["B = 16, gpt2, bfloat16"]["nanoGPT"] == [256, 512, 1024, 2048]
    assert lines(rows("training"), "B")["T = 1024, gpt2, bfloat16"]["triton"] == [1, 4, 16]
    attention = rows("causal_attention")
    heads = lines(attention[attention["mode"] == "forward"], "T")
    assert list(heads) == ["B·T = 16384, D = 64, bfloat16", "B·T = 16384, D = 128, bfloat16"]
    assert heads["B·T = 16384, D = 64, bfloat16"]["eager"] == [512, 1024, 2048, 4096]


def test_single_point_is_not_a_sweep(rows):
    training = rows("training")
    assert lines(training[training["case"] == "bfloat16 gpt2 16x1024"], "T") == {}
    assert lines(rows("layer_norm"), "T") == {}
