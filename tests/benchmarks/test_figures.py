import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.reporting import bars, figures, plotting, results, sweeps
from benchmarks.reporting.bars import Bar, Group
from benchmarks.reporting.units import TIMES

FIXTURES = Path(__file__).parent / "fixtures"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawn() -> dict[str, figures.Figure]:
    run = results.load(FIXTURES / "fixture-gpu")
    return {figure.name.removeprefix("fixture-gpu-"): figure for figure in figures.figures(run)}


def texts(figure: figures.Figure) -> list[str]:
    return ["".join(found.itertext()) for found in ElementTree.fromstring(figure.svg).iter(f"{SVG}text")]


def test_what_is_drawn(drawn):
    operators = [("layer_norm", "backward"), ("gelu_ffn", "both"), ("causal_attention", "backward")]
    expected = {
        *("training-speed-up-step-1", "training-by-T-step", "training-by-B-step", "training-memory-step-1"),
        *("generation-speed-up-generate-1", "generation-memory-generate-1"),
        *("causal_attention-by-T-forward", "causal_attention-by-T-backward"),
        *(f"{suite}-roofline" for suite, _ in operators),
        *(f"{suite}-speed-up-{mode}-1" for suite, other in operators for mode in ("forward", other)),
        *(f"{suite}-memory-{mode}-1" for suite, other in operators for mode in ("forward", other)),
    }
    assert set(drawn) == expected


def test_wins_and_losses_stand_in_one_chart(drawn):
    """75 us of eager over 30 us of triton is 2.50; of the small case triton is slower."""
    figure = drawn["layer_norm-speed-up-forward-1"]
    shown = texts(figure)
    assert f"2.50{TIMES}" in shown
    assert f"0.78{TIMES} slower" in shown
    assert "bfloat16 512x4096" in shown
    fills = [plotting.PALETTE[name][0] for name in ("own", "own-loss", "peer")]
    assert len(set(fills)) == 3
    for name in ("own", "own-loss", "peer"):
        assert f"var(--{name}, " in figure.svg, name
    assert "eager" not in shown, "the baseline is the line at 1"


def test_losses_of_peers_are_shown_too(drawn):
    figure = drawn["training-speed-up-step-1"]
    assert f"0.67{TIMES} slower" in texts(figure), "40 ms of eager over 60 ms of Hugging Face"
    assert "var(--peer-loss, " in figure.svg


def test_memory(drawn):
    assert {"48.0 MiB", "72.0 MiB"} <= set(texts(drawn["layer_norm-memory-forward-1"]))


def test_the_roofline_has_limits_and_all_providers(drawn):
    shown = texts(drawn["layer_norm-roofline"])
    assert {"measured limits", "data sheet", "triton", "eager", "Liger-Kernel", "forward, float32"} <= set(shown)


def test_an_unknown_gpu_has_no_data_sheet_line():
    run = results.load(FIXTURES / "fixture-unknown")
    roofline = next(figure for figure in figures.figures(run) if figure.name.endswith("roofline"))
    assert "measured limits" in texts(roofline)
    assert "data sheet" not in texts(roofline)
    assert "Dashed" not in roofline.caption


def test_ids_are_unique_and_all_references_hold(drawn):
    ids = [re.findall(r'\bid="([^"]+)"', figure.svg) for figure in drawn.values()]
    assert all(ids), "nothing was tested"
    assert len(set(itertools.chain(*ids))) == sum(map(len, ids))
    for figure, own in zip(drawn.values(), ids, strict=True):
        used = re.findall(r'href="#([^"]+)"', figure.svg) + re.findall(r"url\(#([^)]+)\)", figure.svg)
        assert set(used) == set(own)


def test_svg_is_the_same_every_time_and_takes_the_page_s_colors(drawn):
    again = figures.figures(results.load(FIXTURES / "fixture-gpu"))
    assert [figure.svg for figure in again] == [figure.svg for figure in drawn.values()]
    for figure in again:
        assert "<metadata" not in figure.svg
        assert "http" not in figure.svg.replace('xmlns="http://www.w3.org/2000/svg"', "").replace(
            'xmlns:xlink="http://www.w3.org/1999/xlink"', ""
        )
        bare = re.sub(r"var\(--[a-z0-9-]+, #[0-9a-f]{6}\)", "", figure.svg)
        assert re.findall(r"(?:fill|stroke): ?(#[0-9a-f]+)", bare) == [], "a colour that would not turn dark"


def test_colors_can_be_told_apart():
    """Each light one is replaced by its name, so two must never be equal; nor may two of a chart be alike."""
    light = [colors[0] for colors in plotting.PALETTE.values()]
    assert len(set(light)) == len(light)
    many = plotting.provider_styles("abcdefghij")
    assert len(set(many.values())) == 10, "not even the marker differs"
    styles = plotting.provider_styles(["triton", "eager", *"abcde", "triton compiled", "eager compiled"])
    for first, second in itertools.combinations([color for color, _ in styles.values()], 2):
        distance = sum((int(first[at : at + 2], 16) - int(second[at : at + 2], 16)) ** 2 for at in (1, 3, 5)) ** 0.5
        assert distance > 50, (first, second)


def group(number: int, count: int) -> Group:
    return Group(f"case {number}", tuple(Bar(f"p{at}", 1.5, "1.50", "#123456") for at in range(count)))


@pytest.mark.parametrize("sizes", [[4] * 10, [4] * 11, [4] * 25, [7] * 9, [1], [45], [3, 45, 3], [39, 2, 39]])
def test_charts_are_split_between_cases(sizes):
    groups = [group(number, count) for number, count in enumerate(sizes)]
    parts = bars.split(groups)
    assert [found for part in parts for found in part] == groups
    assert all(parts)
    for part in parts:
        assert sum(len(found.bars) for found in part) <= bars.LIMIT or len(part) == 1


def test_a_chart_that_fits_is_not_split():
    assert len(bars.split([group(number, 4) for number in range(10)])) == 1
    assert [len(part) for part in bars.split([group(number, 4) for number in range(12)])] == [6, 6]
    assert bars.split([]) == []


def test_height_grows_with_the_number_of_bars():
    with plotting.style():
        few, many = (bars.draw([group(0, count)], 1.0, True, "") for count in (4, 40))
    assert many.get_figheight() - few.get_figheight() == pytest.approx(36 * 0.21)


def rows(suite: str) -> list:
    return [row for row in results.load(FIXTURES / "fixture-gpu").rows if row.suite == suite]


def test_sweeps_hold_everything_else_fixed():
    """Training varies T at one batch; attention varies T at one number of tokens, by head size."""
    by_length = sweeps.sweeps(rows("training"), "T")
    assert list(by_length) == ["B = 16, gpt2, bfloat16"]
    assert list(by_length["B = 16, gpt2, bfloat16"]["nanoGPT"]) == [256, 512, 1024, 2048]
    by_batch = sweeps.sweeps(rows("training"), "B")
    assert list(by_batch["T = 1024, gpt2, bfloat16"]["triton"]) == [1, 4, 16]
    forward = [row for row in rows("causal_attention") if row.mode == "forward"]
    heads = sweeps.sweeps(forward, "T")
    assert list(heads) == ["B·T = 16384, D = 64, bfloat16", "B·T = 16384, D = 128, bfloat16"]
    assert list(heads["B·T = 16384, D = 64, bfloat16"]["eager"]) == [512, 1024, 2048, 4096]


def test_a_single_point_is_no_sweep():
    single = [row for row in rows("training") if row.case == "bfloat16 gpt2 16x1024"]
    assert sweeps.sweeps(single, "T") == {}
    assert sweeps.draw(single, "T") is None
    assert sweeps.draw(rows("layer_norm"), "T") is None
