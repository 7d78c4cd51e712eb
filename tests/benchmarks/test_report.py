import re
from operator import itemgetter
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.report import readme_figures
from benchmarks.reporting import results, tables, units
from benchmarks.reporting.markdown import escape
from benchmarks.reporting.names import KEY
from benchmarks.reporting.results import ResultsError
from benchmarks.reporting.units import NOTHING, SLOWER, TIMES


def rendered(folder: Path) -> str:
    return report.render_markdown(results.load(folder), folder)


@pytest.fixture(scope="module")
def gpu(gpu_folder) -> str:
    return rendered(gpu_folder)


def section(text: str, title: str) -> str:
    """The part of Markdown under a heading."""
    _, found, rest = text.partition(f"# {title}\n")
    assert found, f"no heading {title}"
    return re.split(r"^#+ ", rest, flags=re.MULTILINE)[0]


def line(text: str, *cells: str) -> list[str]:
    """The cells of the table's row that begins with `cells`; the heading of a group counts for all its rows."""
    heading = ""
    for row in text.splitlines():
        found = [cell.strip() for cell in row.strip("|").split(" | ")]
        heading = found[0] or heading
        if (heading, *found[1:])[: len(cells)] == cells:
            return [heading, *found[1:]]
    raise AssertionError(f"no row {cells}")


def test_report_orders_its_sections(gpu):
    assert re.findall(r"^## (.*)", gpu, re.MULTILINE) == [
        *("Summary", "Models", "Layer norm", "GELU feed-forward", "Causal attention"),
        *("What was not measured, and why", "How the figures were taken"),
    ]


def test_headline_has_device_versions_and_limits(gpu):
    head = gpu.partition("## Summary")[0]
    for fact in (
        "Fixture GPU, driver 999.10",
        "gptfast 0.0.0, PyTorch 9.9.0, Triton 9.7.0, CUDA 99.0, Python 3.99.0, 16 threads",
        "liger-kernel 0.0.1, transformers 0.0.2, nanoGPT not installed",
        "bbbbbbbbbb and aaaaaaaaaa with uncommitted changes",
        "2001-02-04 04:05 UTC",
        "copy 4,000 GB/s, bfloat16 matmul 700 TFLOP/s, float32 matmul 50.0 TFLOP/s",
        "Fixture: bfloat16 1,000 TFLOP/s, memory 5,000 GB/s; source: invented data sheet",
        "> Measured with uncommitted changes: models.json.",
    ):
        assert fact in head


def test_summary_has_ratios_to_every_peer(gpu):
    """30 ms of triton against 60 ms, 42 ms and 40 ms."""
    summary = section(gpu, "Summary")
    assert line(summary, "Training step vs Hugging Face")[1:] == [f"2.00{TIMES}", "triton, 1 case"]
    assert re.fullmatch(rf"0\.\d\d{TIMES} {SLOWER} to 1\.40{TIMES}", line(summary, "Training step vs nanoGPT")[1])
    steps, case = section(gpu, "Training step: times as fast as"), "bfloat16 gpt2 16x1024"
    assert line(steps, "case") == ["case", "gptfast", "eager", "Hugging Face", "nanoGPT"]
    assert line(steps, case, "triton")[2:] == [f"1.33{TIMES}", f"2.00{TIMES}", f"1.40{TIMES}"]
    assert line(steps, case, "eager")[2:] == [NOTHING, f"1.50{TIMES}", f"1.05{TIMES}"]


def test_summary_has_worst_and_best_case_of_operators(gpu):
    operators = section(gpu, "Operators: worst and best case")
    norm = line(operators, "Layer norm, triton", "forward vs eager")[2:]
    assert norm == [f"0.78{TIMES} {SLOWER}", "bfloat16 512x4096", f"2.50{TIMES}", "bfloat16 32768x768", "3 of 4"]
    ffn = line(operators, "GELU feed-forward, triton", "forward vs best peer")
    assert ffn[6] == "0 of 3"
    assert r"(\_addmm_activation)" in ffn[3]


def cells(table: str, case: str, provider: str) -> dict[str, str]:
    return dict(zip(line(table, "case"), line(table, case, provider), strict=True))


def test_model_tables_have_speed_time_memory_and_utilisation(gpu):
    """16384 tokens in 30 ms; 857,246,208 FLOPs a token by PaLM and 800,623,104 causal, of 1000 TFLOP/s."""
    steps, case = section(gpu, "Training step"), "bfloat16 gpt2 16x1024"
    assert cells(steps, case, "triton") == {
        "case": case,
        "provider": "triton",
        "tokens/s": "546,133",
        "median": "30.0 ms",
        "over eager": f"1.33{TIMES}",
        "p20": "29.6 ms",
        "p80": "30.7 ms",
        "peak memory": "11.9 GiB",
        "MFU (PaLM)": "46.8 %",
        "MFU (causal)": "43.7 %",
    }
    assert cells(steps, case, "Hugging Face")["over eager"] == f"0.67{TIMES} {SLOWER}"
    generation = line(section(gpu, "Generation"), "case")
    assert {"tokens/s", "first token", "per token", "read per token", "MBU"} <= set(generation)


def test_operator_tables_have_the_rate_that_binds(gpu):
    """2 * 2 * 32768 * 768 bytes in 30 us are 3355 GB/s, 83.9 % of 4000; 48 MiB is the output."""
    norm, case = section(gpu, "Layer norm, forward"), "bfloat16 32768x768"
    assert cells(norm, case, "triton") == {
        "case": case,
        "provider": "triton",
        "median": "30.0 µs",
        "over eager": f"2.50{TIMES}",
        "p20": "29.6 µs",
        "p80": "30.7 µs",
        "host time": "21.5 µs",
        "throughput": "3,355 GB/s",
        "of copy rate": "83.9 %",
        "extra memory": "48.0 MiB",
        "error": "3.1e-03",
    }
    ffn = cells(section(gpu, "GELU feed-forward, forward"), "bfloat16 16384x768", "triton")
    assert ffn["throughput"].endswith(" TFLOP/s")
    assert ffn["of matmul rate"].endswith(" %")
    attention = cells(section(gpu, "Causal attention, forward"), "bfloat16 2x16x8192x64", "triton")
    assert attention["over eager"] == NOTHING, "eager was not measured there"


def test_report_shows_every_row_once(gpu_folder):
    run = results.load(gpu_folder)
    shown = [table for found in tables.content(run, gpu_folder)["tables"].values() for table in found]
    assert sum(len(table.rows) for table in shown) == len(run.rows) == 150


def test_missing_measurements_are_grouped_by_reason(gpu, fixtures, rewrite):
    missing = section(gpu, "What was not measured, and why").strip().splitlines()[2:]
    assert missing == [
        r"| 3 | GELU feed-forward: \_addmm_activation, forward + backward | it has no backward |",
        r"| 2 | Causal attention: eager, forward and backward | out of memory: it needs 48 GiB \| 40 GiB are free |",
    ]
    reason = "Triton kernels are measured\n  on CUDA devices; none was found"  # other white space
    other = {"suite": "layer_norm", "case": "x", "mode": "forward", "provider": "y", "reason": reason}
    rewrite(fixtures / "fixture-cpu/all.json", lambda data: data["not_measured"].append(other))
    assert tables.not_measured(results.load(fixtures / "fixture-cpu").not_measured) == [
        (5, "Layer norm: triton, forward and backward; Layer norm: y, forward", " ".join(reason.split()))
    ]


def test_unknown_gpu_has_no_mfu(stored):
    text = rendered(stored / "fixture-unknown")
    assert "**Data sheet:** unknown GPU: no peak, MFU not given" in text
    assert "MFU" not in text.replace("MFU not given", "")
    norm = line(section(text, "Layer norm, forward"), "case")
    assert not {"host time", "error", "extra memory"} & set(norm), "columns without a value"


def test_cpu_report_names_its_backend(stored):
    text = rendered(stored / "fixture-cpu")
    assert "**Peak:** CPU: no peak, MFU not given" in text
    assert "Triton was not measured on this device: gptfast's figures are those of its cpu backend." in text
    steps = section(text, "Training step: times as fast as")
    assert line(steps, "float32 gpt2 12x64", "cpu")[2] == f"1.28{TIMES}", "over eager, plain PyTorch"
    assert "CUDA events" not in text
    assert "Wall clock" in text


def test_without_eager_cpu_is_the_baseline(fixtures, rewrite):
    def only_cpu(data):
        data["benchmarks"] = [item for item in data["benchmarks"] if "eager" not in item["extra_info"]["provider"]]

    path = rewrite(fixtures / "fixture-cpu/all.json", only_cpu)
    steps = section(rendered(path.parent), "Training step")
    assert cells(steps, "float32 gpt2 12x64", "cpu")["over cpu"] == f"1.00{TIMES}"


def test_measurements_of_different_files_have_no_ratio(fixtures, rewrite):
    """One row is newer than its baseline."""
    folder, newer = fixtures / "fixture-gpu", ("layer_norm", "bfloat16 32768x768", "forward", "triton")

    def later(data):
        data["datetime"] = "2002-01-01T00:00:00+00:00"
        data["benchmarks"] = [item for item in data["benchmarks"] if itemgetter(*KEY)(item["extra_info"]) == newer]

    def over_eager() -> dict[tuple[str, ...], float]:
        rows = results.load(folder).rows
        found = tables.add_ratios(rows, rows[rows["provider"] == "eager"])
        return found.set_index(KEY)["ratio"].dropna().to_dict()

    before = over_eager()
    rewrite(folder / "operators.json", later, folder / "later.json")
    assert set(before) - set(over_eager()) == {newer}
    assert len(results.load(folder).rows) == 150


def test_training_step_has_its_share_of_the_roofline(fixtures, rewrite):
    def predicted(data):
        for row in (item["extra_info"] for item in data["benchmarks"]):
            if row["provider"] == "triton" and row["suite"] == "training":
                row["roofline_seconds"] = row["seconds"]["median"] / 4

    path = rewrite(fixtures / "fixture-gpu/models.json", predicted)
    steps = section(rendered(path.parent), "Training step")
    assert cells(steps, "bfloat16 gpt2 16x1024", "triton")["of roofline"] == "25.0 %"
    assert cells(steps, "bfloat16 gpt2 16x1024", "eager")["of roofline"] == NOTHING


def test_report_of_files_without_rows(fixtures, rewrite):
    path = rewrite(fixtures / "fixture-cpu/all.json", lambda data: data.update(benchmarks=[], not_measured=[]))
    assert "Nothing" in section(rendered(path.parent), "What was not measured, and why")
    assert report.render_html(results.load(path), path.parent)


def test_files_are_listed_newest_first(gpu_folder):
    found = tables.sources(results.load(gpu_folder)).rows.itertuples(index=False)
    found = [tuple(line) for line in found]
    assert [cells[:4] for cells in found] == [
        ("operators.json", "2001-02-04 04:05", "bbbbbbbbbb", "no"),
        ("models.json", "2001-02-03 04:05", "aaaaaaaaaa", "yes"),
    ]
    assert sum(int(cells[-1]) for cells in found) == 150


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        (units.ratio, (1.0, 0.996, 0.994, None), (f"1.00{TIMES}", f"1.00{TIMES}", f"0.99{TIMES} {SLOWER}", NOTHING)),
        (units.seconds, (2.5, 0.0123, 4.56e-5, 1e-7), ("2.50 s", "12.3 ms", "45.6 µs", "0.10 µs")),
        (units.size, (0, 1536, 3 * 2**20, 2**34), ("0 B", "1.50 KiB", "3.00 MiB", "16.0 GiB")),
        (units.compute, (5e13, 5e10, float("nan")), ("50.0 TFLOP/s", "50.0 GFLOP/s", NOTHING)),
    ],
)
def test_units_have_three_digits(text, values, expected):
    assert tuple(map(text, values)) == expected


def test_markdown_escapes_hostile_text():
    assert escape("a|b\n<script> *x* `y` [z]") == r"a\|b \<script\> \*x\* \`y\` \[z\]"
    assert escape("layer_norm _x") == r"layer_norm \_x"


@pytest.fixture
def readme(tmp_path) -> Path:
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- figures:start -->\nold figures\n<!-- figures:end -->\nafter\n", encoding="utf-8")
    return path


def test_command_writes_reports_and_readme(fixtures, readme, capsys):
    (fixtures / "fixture-gpu" / "broken.json").write_text('{"gptfast_results": 1, ')
    (fixtures / "empty").mkdir()
    (fixtures / "foreign").mkdir()
    (fixtures / "foreign" / "results.json").write_text("{}")
    (fixtures / "fixture-gpu" / "report.md").write_text("an older report")
    report.main([str(fixtures), "--readme", str(readme)])
    errors = capsys.readouterr().err
    assert "fixture-gpu/broken.json: " in errors
    assert "foreign: no results in this folder" in errors
    for name in ("fixture-gpu", "fixture-unknown", "fixture-cpu"):
        files = {path.name for path in (fixtures / name).iterdir() if path.suffix != ".json"}
        assert files == {"report.md", "report.html"}
    assert list((fixtures / "foreign").iterdir()) == [fixtures / "foreign" / "results.json"]
    for form in ("md", "html"):
        text = (fixtures / "fixture-gpu" / f"report.{form}").read_text(encoding="utf-8")
        assert "Not read: broken.json: " in text
        assert str(fixtures) not in text, "a path of this machine"
    figures = f"<!-- figures:start -->\n{readme_figures(fixtures)}<!-- figures:end -->"
    assert readme.read_text(encoding="utf-8") == f"before\n{figures}\nafter\n"


def test_readme_figures_have_all_devices(stored):
    figures = readme_figures(stored)
    assert line(figures, "Fixture GPU", "Training step, bfloat16 gpt2 16x1024")[2:] == [
        "546,133 tokens/s, MFU 46.8 %",
        f"1.33{TIMES} eager, 2.00{TIMES} Hugging Face, 1.40{TIMES} nanoGPT",
    ]
    norm = line(figures, "Fixture GPU", "Layer norm, forward")[3]
    assert norm.startswith(f"0.78{TIMES} {SLOWER} to 2.50{TIMES} eager, ")
    assert "MFU" not in "".join(line(figures, "Fixture GPU without data sheet"))
    notes = [text for text in figures.splitlines() if text.startswith("- ")]
    assert len(notes) == 3
    assert "driver 999.10, gptfast 0.0.0, PyTorch 9.9.0" in notes[1]
    assert "at commit bbbbbbbbbb and aaaaaaaaaa with uncommitted changes" in notes[1]


@pytest.mark.parametrize(
    "text",
    ["nothing", "<!-- figures:start -->", "<!-- figures:end -->", "<!-- figures:end --><!-- figures:start -->", None],
)
def test_readme_without_markers_is_left_alone(fixtures, readme, capsys, text):
    if text is None:
        readme.unlink()
    else:
        readme.write_text(text)
    with pytest.raises(SystemExit) as ended:
        report.main([str(fixtures), "--readme", str(readme)])
    assert ended.value.code == (1 if text is None else 2)
    error = capsys.readouterr().err
    assert error.startswith("benchmarks.report: ")
    assert str(readme) in error
    assert error.count("\n") == 1
    assert not list(fixtures.glob("*/report.*")), "it failed late"
    assert text is None or readme.read_text() == text


def test_folder_without_any_device_is_an_error(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(SystemExit) as ended:
            report.main([str(folder)])
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
        with pytest.raises(ResultsError, match=re.escape(str(folder))):
            readme_figures(folder)
