import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.reporting import results
from benchmarks.reporting.results import ResultsError

GPU = Path(__file__).parent / "fixtures" / "fixture-gpu"


def by_key(run, *key):
    found = [row for row in run.rows if row.key == key]
    assert len(found) == 1
    return found[0]


def test_a_file():
    run = results.load(GPU / "operators.json")
    assert (run.machine.device, run.machine.slug, run.machine.threads) == ("Fixture GPU", "fixture-gpu", 16)
    assert run.machine.copy_bytes_per_second == 4e12
    assert run.machine.matrix_flops_per_second == {"bfloat16": 700e12, "float32": 50e12}
    assert run.machine.peak.flops == {"bfloat16": 1000e12}
    assert run.machine.peers == {"liger-kernel": "0.0.1", "transformers": "0.0.2", "nanoGPT": None}
    row = by_key(run, "layer_norm", "bfloat16 32768x768", "forward", "triton")
    assert row.dims == {"N": 32768, "C": 768}
    assert row.seconds.median == 30e-6
    assert row.bytes_per_second == pytest.approx(2 * 2 * 32768 * 768 / 30e-6)
    assert row.mfu is None, "a field that is absent"
    assert (row.source.commit, row.source.dirty) == ("b" * 40, False)


def test_of_a_row_taken_twice_the_newer_counts():
    older = by_key(results.load(GPU / "models.json"), "layer_norm", "bfloat16 32768x768", "forward", "eager")
    assert older.seconds.median == 1.0
    row = by_key(results.load(GPU), *older.key)
    assert row.seconds.median == 75e-6
    assert (row.source.commit, row.source.dirty) == ("b" * 40, False)


def test_date_decides_and_not_the_name_of_the_file(fixtures, rewrite):
    folder = fixtures / "fixture-gpu"
    rewrite(folder / "models.json", lambda data: data.update(datetime="2002-01-01T00:00:00"))
    row = by_key(results.load(folder), "layer_norm", "bfloat16 32768x768", "forward", "eager")
    assert row.seconds.median == 1.0
    assert (row.source.commit, row.source.dirty) == ("a" * 40, True)


def test_merging_keeps_what_only_one_file_has():
    models, operators, both = (results.load(GPU / name) for name in ("models.json", "operators.json", ""))
    assert {row.key for row in both.rows} == {row.key for run in (models, operators) for row in run.rows}
    assert by_key(both, "training", "bfloat16 gpt2 16x1024", "step", "triton").source.commit == "a" * 40
    assert [Path(source.path).name for source in both.sources] == ["models.json", "operators.json"]


def test_a_file_without_figures_does_not_tell_the_machine(fixtures, rewrite):
    folder = fixtures / "fixture-gpu"

    def later(data):
        data.update(datetime="2100-01-01T00:00:00+00:00", benchmarks=[], not_measured=[])
        data["machine_info"]["gptfast"]["limits"]["copy_bytes_per_second"] = 1.0

    before = results.load(folder).machine
    rewrite(folder / "operators.json", later, folder / "later.json")
    assert results.load(folder).machine == before
    assert results.load(folder / "later.json").machine.copy_bytes_per_second == 1.0


def test_what_any_file_measured_is_not_missing():
    missing = ("layer_norm", "bfloat16 32768x768", "forward", "triton")
    assert missing in [item.key for item in results.load(GPU / "models.json").not_measured]
    merged = results.load(GPU)
    assert missing not in [item.key for item in merged.not_measured]
    assert len(merged.not_measured) == 5


def test_of_a_reason_given_twice_the_newer_counts(fixtures, rewrite):
    folder = fixtures / "fixture-gpu"

    def later(data):
        data["datetime"] = "2002-01-01T00:00:00+00:00"
        data["not_measured"][0]["reason"] = "another reason"

    rewrite(folder / "operators.json", later, folder / "later.json")
    reasons = [item.reason for item in results.load(folder).not_measured]
    assert len(reasons) == 5
    assert reasons.count("another reason") == 1


def test_rows_are_in_order():
    rows = results.load(GPU).rows
    suites = list(dict.fromkeys(row.suite for row in rows))
    assert suites == ["training", "generation", "layer_norm", "gelu_ffn", "causal_attention"]
    lengths = [row.dims["T"] for row in rows if row.key[::2] == ("causal_attention", "forward") and row.dims["D"] == 64]
    assert lengths == sorted(lengths)
    providers = [row.provider for row in rows if row.case == "bfloat16 gpt2 16x1024"]
    assert providers == ["triton", "triton compiled", "eager", "eager compiled", "Hugging Face", "nanoGPT"]


def drop(*path):
    def edit(data):
        for name in path[:-1]:
            data = data[name]
        del data[path[-1]]

    return edit


def put(value, *path):
    def edit(data):
        for name in path[:-1]:
            data = data[name]
        data[path[-1]] = value

    return edit


ROW = ("benchmarks", 3, "extra_info")
MACHINE = ("machine_info", "gptfast")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("gptfast_results"), 'not a results file of gptfast; accepted: JSON with "gptfast_results": 1'),
        (put(2, "gptfast_results"), "gptfast_results is 2; accepted: 1"),
        (put("1", "gptfast_results"), "gptfast_results is '1'; accepted: 1"),
        (put(True, "gptfast_results"), "gptfast_results is True; accepted: 1"),
        (drop("not_measured"), "not_measured is missing; accepted: a list"),
        (drop(*MACHINE), "machine_info.gptfast is missing; accepted: an object"),
        (drop(*MACHINE, "slug"), "machine_info.gptfast.slug is missing; accepted: a text"),
        (
            put(0, *MACHINE, "limits", "copy_bytes_per_second"),
            "machine_info.gptfast.limits.copy_bytes_per_second is 0; accepted: a finite number above 0",
        ),
        (drop("commit_info", "dirty"), "commit_info.dirty is missing; accepted: true or false"),
        (put("yesterday", "datetime"), "datetime is 'yesterday'; accepted: a date and time by ISO 8601"),
        (drop(*ROW), "benchmarks[3].extra_info is missing; accepted: an object"),
        (drop(*ROW, "provider"), "benchmarks[3].extra_info.provider is missing; accepted: a text"),
        (drop(*ROW, "seconds", "p80"), "benchmarks[3].extra_info.seconds.p80 is missing; accepted: a number"),
        (put("fast", *ROW, "mfu"), 'benchmarks[3].extra_info.mfu is "fast"; accepted: a number'),
        (
            put(float("nan"), *ROW, "seconds", "median"),
            "benchmarks[3].extra_info.seconds.median is nan; accepted: a finite number above 0",
        ),
        (
            put(float("inf"), *ROW, "seconds", "p80"),
            "benchmarks[3].extra_info.seconds.p80 is inf; accepted: a finite number above 0",
        ),
        (
            put(9, *ROW, "seconds", "p20"),
            "benchmarks[3].extra_info.seconds is not in order; accepted: p20 <= median <= p80",
        ),
        (put([], *ROW, "dims"), "benchmarks[3].extra_info.dims is []; accepted: an object"),
        (
            lambda data: data["benchmarks"].append(data["benchmarks"][0]),
            "benchmarks[121] measures layer_norm, bfloat16 32768x768, forward, eager again; accepted: once per file",
        ),
    ],
)
def test_bad_files_are_one_line(tmp_path, rewrite, edit, message):
    path = rewrite(GPU / "operators.json", edit, tmp_path / "bad.json")
    with pytest.raises(ResultsError) as raised:
        results.load(path)
    assert str(raised.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((GPU / "operators.json").read_bytes()[:5000], "not JSON, or cut short: "),
        (b"", "not JSON, or cut short: "),
        (b"[" * 100_000, "not JSON, or cut short: "),
        (b"[1]", "not a results file of gptfast; "),
        (b"\xff\xfe", "cannot be read: not text in UTF-8; "),
        (None, "cannot be read: No such file or directory; "),
    ],
    ids=["truncated", "empty", "deep", "list", "binary", "absent"],
)
def test_unreadable_files_are_one_line(tmp_path, content, message):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ResultsError, match=rf"^{re.escape(str(path))}: {message}[^\n]*$"):
        results.load(path)


def test_a_folder_goes_on_without_its_bad_files(fixtures):
    folder = fixtures / "fixture-gpu"
    (folder / "foreign.json").write_text("{}")
    run = results.load(folder)
    assert run.rows == tuple(results.load(folder).rows)
    assert len(run.rows) == len(results.load(GPU).rows)
    assert run.problems == (
        f'{folder / "foreign.json"}: not a results file of gptfast; accepted: JSON with "gptfast_results": 1',
    )


def test_a_folder_holds_one_device(fixtures, rewrite):
    """The one it is named after, though the other is newer."""
    folder = fixtures / "fixture-gpu"
    (fixtures / "fixture-cpu" / "all.json").rename(folder / "astray.json")
    run = results.load(folder)
    assert run.machine.device == "Fixture GPU"
    assert run.problems == (f"{folder / 'astray.json'}: measured on Fixture CPU; accepted in its folder: Fixture GPU",)
    with pytest.raises(ResultsError, match="cannot merge results of Fixture CPU and Fixture GPU"):
        results.merge([results.load(folder / "astray.json"), results.load(folder / "models.json")])


def test_a_folder_without_results(tmp_path):
    with pytest.raises(ResultsError, match="no results in this folder: it has no"):
        results.load(tmp_path)


def test_the_fixtures_are_what_their_script_writes(tmp_path):
    """And are on no real device."""
    script = (GPU.parent / "generate.py").read_text(encoding="utf-8")
    (tmp_path / "generate.py").write_text(script, encoding="utf-8")
    subprocess.run([sys.executable, tmp_path / "generate.py"], check=True)
    written = sorted(tmp_path.glob("*/*.json"))
    assert len(written) == 4
    for path in written:
        assert path.read_text() == (GPU.parent / path.relative_to(tmp_path)).read_text()
        assert json.loads(path.read_text())["machine_info"]["gptfast"]["device"].startswith("Fixture ")
