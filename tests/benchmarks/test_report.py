import dataclasses
import re
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.reporting import content, markdown, ratios, results, tables, units
from benchmarks.reporting.results import ResultsError
from benchmarks.reporting.rows import NotMeasured, Source
from benchmarks.reporting.units import LOSS, TIMES

FIXTURES = Path(__file__).parent / "fixtures"


def written(name: str) -> str:
    folder = FIXTURES / name
    run = results.load(folder)
    return markdown.render(content.content(run, folder), run.machine.device)


@pytest.fixture(scope="module")
def gpu() -> str:
    return written("fixture-gpu")


def section(text: str, title: str) -> str:
    """The part of Markdown under a heading."""
    _, found, rest = text.partition(f"# {title}\n")
    assert found, f"no heading {title}"
    return re.split(r"^#+ ", rest, flags=re.M)[0]


def line(text: str, *cells: str) -> list[str]:
    """The cells of the table's row that begins with these; the heading of a group counts for all its rows."""
    heading = ""
    for row in text.splitlines():
        found = [cell.strip() for cell in row.strip("|").split(" | ")]
        heading = found[0] or heading
        if (heading, *found[1:])[: len(cells)] == cells:
            return [heading, *found[1:]]
    raise AssertionError(f"no row {cells}")


def test_the_order_of_the_sections(gpu):
    assert re.findall(r"^## (.*)", gpu, re.M) == [
        *("Summary", "Models", "Layer norm", "GELU feed-forward", "Causal attention"),
        *("What was not measured, and why", "How the figures were taken"),
    ]


def test_the_headline(gpu):
    head = gpu.partition("## Summary")[0]
    for fact in (
        "**Device:** Fixture GPU, driver 999.10",
        "gptfast 0.0.0, PyTorch 9.9.0, Triton 9.7.0, CUDA 99.0, Python 3.99.0, 16 threads",
        "liger-kernel 0.0.1, transformers 0.0.2, nanoGPT not installed",
        "**Commit:** bbbbbbbbbb and aaaaaaaaaa with uncommitted changes",
        "**Measured:** 2001-02-04 04:05 UTC",
        "copy 4,000 GB/s, bfloat16 matrix product 700 TFLOP/s, float32 matrix product 50.0 TFLOP/s",
        "Fixture: bfloat16 1,000 TFLOP/s, memory 5,000 GB/s; source: invented data sheet",
        "> Measured with uncommitted changes: models.json.",
    ):
        assert fact in head


def test_the_summary_leads_with_ratios_against_peers(gpu):
    """30 ms of triton against 60 ms, 42 ms and 40 ms."""
    summary = section(gpu, "Summary")
    assert line(summary, "Training step vs Hugging Face")[1:] == [f"2.00{TIMES}", "triton, 1 case"]
    worst, best = line(summary, "Training step vs nanoGPT")[1].split(" to ")
    assert best == f"1.40{TIMES}"
    assert worst.endswith(LOSS)
    case = "bfloat16 gpt2 16x1024"
    steps = section(gpu, "Training step: times as fast as")
    assert line(steps, "case") == ["case", "gptfast", "eager", "Hugging Face", "nanoGPT"]
    assert line(steps, case, "triton")[2:] == [f"1.33{TIMES}", f"2.00{TIMES}", f"1.40{TIMES}"]
    assert line(steps, case, "eager")[2:] == ["—", f"1.50{TIMES}", f"1.05{TIMES}"]


def test_operators_are_summed_up_by_their_worst_and_best(gpu):
    operators = section(gpu, "Operators: worst and best case")
    norm = line(operators, "Layer norm, triton", "forward vs eager")
    assert norm[3] == "bfloat16 512x4096"
    assert norm[2] == f"0.78{TIMES} {LOSS}"
    assert norm[4:] == [f"2.50{TIMES}", "bfloat16 32768x768", "3 of 4"]
    ffn = line(operators, "GELU feed-forward, triton", "forward vs best peer")
    assert ffn[6] == "0 of 3"
    assert r"(\_addmm_activation)" in ffn[3]


def test_model_tables(gpu):
    """16384 tokens in 30 ms; 857,246,208 FLOPs a token by PaLM and 800,623,104 causal, of 1000 TFLOP/s."""
    steps = section(gpu, "Training step")
    assert line(steps, "case")[2:] == [
        *("tokens/s", "over eager", "step, p20", "median", "p80", "peak memory", "MFU (PaLM)", "MFU (causal)")
    ]
    assert line(steps, "bfloat16 gpt2 16x1024", "triton")[2:] == [
        *("546,133", f"1.33{TIMES}", "29.6 ms", "30.0 ms", "30.7 ms", "11.9 GiB", "46.8 %", "43.7 %")
    ]
    assert line(steps, "bfloat16 gpt2 16x1024", "Hugging Face")[3] == f"0.67{TIMES} {LOSS}"
    generation = line(section(gpu, "Generation"), "case")
    assert {"tokens/s", "first token", "per token", "read per token", "MBU"} <= set(generation)


def test_kernel_tables(gpu):
    """2 * 2 * 32768 * 768 bytes in 30 us are 3355 GB/s, 83.9 % of 4000; 48 MiB is the output."""
    norm = section(gpu, "Layer norm, forward")
    found = dict(zip(line(norm, "case"), line(norm, "bfloat16 32768x768", "triton"), strict=True))
    assert found == {
        "case": "bfloat16 32768x768",
        "provider": "triton",
        "median time": "30.0 µs",
        "over eager": f"2.50{TIMES}",
        "p20": "29.6 µs",
        "p80": "30.7 µs",
        "host time": "21.5 µs",
        "throughput": "3,355 GB/s",
        "of copy rate": "83.9 %",
        "error": "3.1e-03",
        "extra memory": "48.0 MiB",
    }
    assert line(norm, "bfloat16 32768x768", "Liger-Kernel")[3] == f"2.08{TIMES}"
    ffn = section(gpu, "GELU feed-forward, forward")
    assert "of matrix rate" in line(ffn, "case")
    assert line(ffn, "bfloat16 16384x768", "triton")[7].endswith(" TFLOP/s")
    attention = section(gpu, "Causal attention, forward")
    assert line(attention, "bfloat16 2x16x8192x64", "triton")[3] == "—", "eager was not measured there"


def test_every_row_is_shown_once(gpu):
    run = results.load(FIXTURES / "fixture-gpu")
    shown = sum(
        len(lines)
        for made in [tables.model_tables(run), *(tables.kernel_tables(run, suite) for suite in tables.suites(run.rows))]
        for table in made
        for lines in table.groups.values()
    )
    assert shown == len(run.rows) == 150


def test_reasons_are_folded(gpu):
    missing = section(gpu, "What was not measured, and why").strip().splitlines()[2:]
    assert missing == [
        r"| 3 | GELU feed-forward: \_addmm_activation, forward + backward | it has no backward |",
        r"| 2 | Causal attention: eager, forward and backward | out of memory: it needs 48 GiB \| 40 GiB are free |",
    ]


def test_reasons_of_other_layout_are_the_same():
    run = results.load(FIXTURES / "fixture-cpu")
    assert [(count, reason) for count, _, reason in tables.not_measured(run)] == [
        (4, "Triton kernels are measured on CUDA devices; none was found")
    ]
    more = NotMeasured(
        "layer_norm", "x", "forward", "y", "Triton kernels are measured\n  on CUDA devices; none was found"
    )
    found = tables.not_measured(dataclasses.replace(run, not_measured=(*run.not_measured, more)))
    assert [count for count, _, _ in found] == [5]
    assert found[0][1] == "Layer norm: triton, forward and backward; Layer norm: y, forward"


def test_an_unknown_gpu_has_no_mfu():
    text = written("fixture-unknown")
    assert "**Data sheet:** unknown GPU: no peak, MFU not given" in text
    assert "MFU" not in text.replace("MFU not given", "")
    norm = line(section(text, "Layer norm, forward"), "case")
    assert not {"host time", "error", "extra memory"} & set(norm), "columns without a value"


def test_a_cpu_stands_with_its_eager_backend():
    text = written("fixture-cpu")
    assert "**Peak:** CPU: no peak, MFU not given" in text
    assert "Triton was not measured on this device" in text
    steps = section(text, "Training step: times as fast as")
    assert line(steps, "float32 gpt2 12x64", "eager")[4] == f"0.99{TIMES} {LOSS}"
    assert "CUDA events" not in text
    assert "Wall clock" in text


def test_what_was_measured_in_another_run_is_not_compared(fixtures, rewrite):
    """One row that is newer than its baseline: it stands in the report, without a ratio."""
    folder = fixtures / "fixture-gpu"

    def later(data):
        data["datetime"] = "2002-01-01T00:00:00+00:00"
        data["benchmarks"] = [item for item in data["benchmarks"] if "32768x768 forward triton" in item["name"]]
        assert len(data["benchmarks"]) == 1

    before = ratios.speed_ups(results.load(folder).rows)
    rewrite(folder / "operators.json", later, folder / "later.json")
    after = ratios.speed_ups(results.load(folder).rows)
    (lost,) = set(before) - set(after)
    assert lost == ("layer_norm", "bfloat16 32768x768", "forward", "triton")
    assert lost in {row.key for row in results.load(folder).rows}


def test_units():
    assert [units.ratio(value) for value in (1.0, 0.996, 0.994, None)] == [
        *(f"1.00{TIMES}", f"1.00{TIMES}", f"0.99{TIMES} {LOSS}", "—")
    ]
    assert [units.seconds(value) for value in (2.5, 0.0123, 4.56e-5, 1e-7)] == [
        "2.50 s",
        "12.3 ms",
        "45.6 µs",
        "0.10 µs",
    ]
    assert [units.size(value) for value in (0, 1536, 3 * 2**20, 2**34)] == ["0 B", "1.50 KiB", "3.00 MiB", "16.0 GiB"]
    assert [units.compute(value) for value in (5e13, 5e10)] == ["50.0 TFLOP/s", "50.0 GFLOP/s"]


def test_markdown_of_hostile_text():
    assert markdown.escape("a|b\n<script> *x* `y` [z]") == r"a\|b \<script\> \*x\* \`y\` \[z\]"
    assert markdown.escape("layer_norm _x") == r"layer_norm \_x"


@pytest.fixture
def readme(tmp_path) -> Path:
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- figures:start -->\nold figures\n<!-- figures:end -->\nafter\n", encoding="utf-8")
    return path


def test_the_command_writes_reports_and_readme(fixtures, readme, capsys):
    (fixtures / "fixture-gpu" / "broken.json").write_text('{"gptfast_results": 1, ')
    (fixtures / "empty").mkdir()
    (fixtures / "foreign").mkdir()
    (fixtures / "foreign" / "results.json").write_text("{}")
    (fixtures / "fixture-gpu" / "report.md").write_text("an older report")
    report.main([str(fixtures), "--readme", str(readme)])
    printed = capsys.readouterr()
    assert "fixture-gpu/broken.json: not JSON" in printed.err
    assert "foreign: no results in this folder" in printed.err
    for name in ("fixture-gpu", "fixture-unknown", "fixture-cpu"):
        files = {path.name for path in (fixtures / name).iterdir() if path.suffix != ".json"}
        assert files == {"report.md", "report.html"}
    assert list((fixtures / "foreign").iterdir()) == [fixtures / "foreign" / "results.json"]
    for form in ("md", "html"):
        text = (fixtures / "fixture-gpu" / f"report.{form}").read_text(encoding="utf-8")
        assert "Not read: broken.json: not JSON, or cut short" in text
        assert str(fixtures) not in text, "a path of this machine"
    text = readme.read_text(encoding="utf-8")
    assert text == (f"before\n<!-- figures:start -->\n{report.readme_figures(fixtures)}<!-- figures:end -->\nafter\n")


def test_what_stands_in_the_readme():
    figures = report.readme_figures(FIXTURES)
    case = ("Fixture GPU", "Training step, bfloat16 gpt2 16x1024")
    assert line(figures, *case)[2:] == [
        "546,133 tokens/s, MFU 46.8 %",
        f"2.00{TIMES} Hugging Face, 1.40{TIMES} nanoGPT, 1.33{TIMES} eager",
    ]
    norm = line(figures, "Fixture GPU", "Layer norm, forward")[3]
    assert norm.startswith(f"0.78{TIMES} {LOSS} to 2.50{TIMES} eager, ")
    assert "MFU" not in "".join(line(figures, "Fixture GPU without data sheet"))
    notes = [text for text in figures.splitlines() if text.startswith("- ")]
    assert len(notes) == 3
    assert "driver 999.10, gptfast 0.0.0, PyTorch 9.9.0" in notes[1]
    assert "at commit bbbbbbbbbb and aaaaaaaaaa with uncommitted changes" in notes[1]


@pytest.mark.parametrize(
    "text",
    ["nothing", "<!-- figures:start -->", "<!-- figures:end -->", "<!-- figures:end --><!-- figures:start -->"],
)
def test_a_readme_without_markers_is_left_alone(fixtures, readme, capsys, text):
    readme.write_text(text)
    with pytest.raises(SystemExit) as ended:
        report.main([str(fixtures), "--readme", str(readme)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert not list(fixtures.glob("*/report.*")), "it failed late"
    assert error == (
        f"benchmarks.report: {readme}: the markers are missing; accepted: a line <!-- figures:start --> and after it a "
        "line <!-- figures:end -->\n"
    )
    assert readme.read_text() == text


def test_a_folder_without_any_device(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(SystemExit) as ended:
            report.main([str(folder)])
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
        with pytest.raises(ResultsError):
            report.readme_figures(folder)


def test_a_file_s_name_is_shown_without_its_folder():
    run = results.load(FIXTURES / "fixture-gpu")
    found = tables.sources(run).groups[""]
    assert [cells[:4] for cells in found] == [
        ("operators.json", "2001-02-04 04:05", "bbbbbbbbbb", "no"),
        ("models.json", "2001-02-03 04:05", "aaaaaaaaaa", "yes"),
    ]
    assert sum(int(cells[-1]) for cells in found) == 150
    assert all(isinstance(source, Source) for source in run.sources)


def test_a_step_is_held_against_its_roofline(fixtures, rewrite):
    folder = fixtures / "fixture-gpu"

    def predicted(data):
        for item in data["benchmarks"]:
            row = item["extra_info"]
            if row["provider"] == "triton" and row["suite"] == "training":
                row["roofline_seconds"] = row["seconds"]["median"] / 4

    rewrite(folder / "models.json", predicted)
    run = results.load(folder)
    steps = section(markdown.render(content.content(run, folder), run.machine.device), "Training step")
    column = line(steps, "case").index("of roofline")
    assert line(steps, "bfloat16 gpt2 16x1024", "triton")[column] == "25.0 %"
    assert line(steps, "bfloat16 gpt2 16x1024", "eager")[column] == "—"
