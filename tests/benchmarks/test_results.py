import functools
import math
import re
import subprocess
import sys
from operator import getitem, setitem
from pathlib import Path

import pytest

from benchmarks.reporting import results
from benchmarks.reporting.names import KEY
from benchmarks.reporting.results import Results, ResultsError


def by_key(run: Results, *key: str):
    """The only row of `key`, and the file that it comes from."""
    rows = run.rows.set_index(KEY)
    assert rows.index.to_list().count(key) == 1
    row = rows.loc[key]
    return row, next(file for file in run.files if file.path == row["source"])


NORM = ("layer_norm", "bfloat16 32768x768", "forward")


def test_load_reads_a_file(gpu_folder):
    run = results.load(gpu_folder / "operators.json")
    machine = run.machine
    assert (machine.device, machine.slug, machine.threads) == ("Fixture GPU", "fixture-gpu", 16)
    assert (machine.copy_rate, machine.matmul_rates) == (4e12, {"bfloat16": 700e12, "float32": 50e12})
    assert machine.peak_rates == {"bfloat16": 1000e12}
    assert machine.peers == {"liger-kernel": "0.0.1", "transformers": "0.0.2", "nanoGPT": None}
    row, file = by_key(run, *NORM, "triton")
    assert row["dims"] == {"N": 32768, "C": 768}
    assert row["median"] == 30e-6
    assert row["bytes_per_second"] == pytest.approx(2 * 2 * 32768 * 768 / 30e-6)
    assert math.isnan(row["mfu"]), "a field that is absent"
    assert (file.commit, file.dirty) == ("b" * 40, False)


def test_load_keeps_the_newest_of_repeated_rows(fixtures, rewrite):
    """The date decides, and not the name of the file."""
    folder = fixtures / "fixture-gpu"
    assert by_key(results.load(folder / "models.json"), *NORM, "eager")[0]["median"] == 1.0
    row, file = by_key(results.load(folder), *NORM, "eager")
    assert (row["median"], file.commit) == (75e-6, "b" * 40)
    rewrite(folder / "models.json", lambda data: data.update(datetime="2002-01-01T00:00:00"))
    row, file = by_key(results.load(folder), *NORM, "eager")
    assert (row["median"], file.commit, file.dirty) == (1.0, "a" * 40, True)


def test_load_merges_the_files_of_a_folder(gpu_folder):
    models, operators, both = (results.load(gpu_folder / name) for name in ("models.json", "operators.json", ""))
    keys = [set(run.rows.set_index(KEY).index) for run in (models, operators, both)]
    assert keys[2] == keys[0] | keys[1]
    assert by_key(both, "training", "bfloat16 gpt2 16x1024", "step", "triton")[1].commit == "a" * 40
    assert [Path(file.path).name for file in both.files] == ["models.json", "operators.json"]


def test_machine_is_that_of_the_newest_measurements(fixtures, rewrite):
    folder = fixtures / "fixture-gpu"

    def later(data):
        data.update(datetime="2100-01-01T00:00:00+00:00", benchmarks=[], not_measured=[])
        data["machine_info"]["gptfast"]["limits"]["copy_bytes_per_second"] = 1.0

    before = results.load(folder).machine
    rewrite(folder / "operators.json", later, folder / "later.json")
    assert results.load(folder).machine == before
    assert results.load(folder / "later.json").machine.copy_rate == 1.0


def test_not_measured_is_what_no_file_has(gpu_folder):
    missing = (*NORM, "triton")
    assert missing in results.load(gpu_folder / "models.json").not_measured.set_index(KEY).index
    merged = results.load(gpu_folder).not_measured
    assert missing not in merged.set_index(KEY).index
    assert len(merged) == 5


def test_not_measured_keeps_the_newest_reason(fixtures, rewrite):
    folder = fixtures / "fixture-gpu"

    def later(data):
        data["datetime"] = "2002-01-01T00:00:00+00:00"
        data["not_measured"][0]["reason"] = "another reason"

    rewrite(folder / "operators.json", later, folder / "later.json")
    reasons = list(results.load(folder).not_measured["reason"])
    assert len(reasons) == 5
    assert reasons.count("another reason") == 1


def test_rows_are_in_the_order_of_the_report(gpu_folder):
    rows = results.load(gpu_folder).rows
    suites = ["training", "generation", "layer_norm", "gelu_ffn", "causal_attention"]
    assert list(rows["suite"].unique()) == suites
    attention = rows[(rows["suite"] == "causal_attention") & (rows["mode"] == "forward")]
    lengths = [dims["T"] for dims in attention["dims"] if dims["D"] == 64]
    assert lengths == sorted(lengths)
    providers = list(rows[rows["case"] == "bfloat16 gpt2 16x1024"]["provider"])
    assert providers == ["triton", "triton compiled", "eager", "eager compiled", "Hugging Face", "nanoGPT"]


def drop(*path):
    return lambda data: functools.reduce(getitem, path[:-1], data).pop(path[-1])


def put(value, *path):
    return lambda data: setitem(functools.reduce(getitem, path[:-1], data), path[-1], value)


ROW = ("benchmarks", 3, "extra_info")
MACHINE = ("machine_info", "gptfast")


@pytest.mark.parametrize(
    ("edit", "field", "given"),
    [
        (drop("gptfast_results"), "gptfast_results", ""),
        (put(2, "gptfast_results"), "gptfast_results", "2"),
        (put(True, "gptfast_results"), "gptfast_results", "true"),
        (drop("not_measured"), "not_measured", ""),
        (drop(*MACHINE, "slug"), "machine_info.gptfast.slug", ""),
        (put(0, *MACHINE, "limits", "copy_bytes_per_second"), "gptfast.limits.copy_bytes_per_second", "0"),
        (put("yesterday", "datetime"), "datetime", '"yesterday"'),
        (drop(*ROW, "provider"), "benchmarks[3].extra_info.provider", ""),
        (drop(*ROW, "seconds", "p80"), "benchmarks[3].extra_info.seconds.p80", ""),
        (put("fast", *ROW, "mfu"), "benchmarks[3].extra_info.mfu", '"fast"'),
        (put(float("nan"), *ROW, "seconds", "median"), "benchmarks[3].extra_info.seconds.median", "NaN"),
        (put(float("inf"), *ROW, "seconds", "p80"), "benchmarks[3].extra_info.seconds.p80", "Infinity"),
        (put(9, *ROW, "seconds", "p20"), "benchmarks[3].extra_info: ", "p20 <= median <= p80"),
        (put([], *ROW, "dims"), "benchmarks[3].extra_info.dims", "[]"),
        (
            lambda data: data["benchmarks"].append(data["benchmarks"][0]),
            "benchmarks",
            "layer_norm, bfloat16 32768x768, forward, eager",
        ),
    ],
)
def test_load_rejects_bad_fields_in_one_line(gpu_folder, tmp_path, rewrite, edit, field, given):
    path = rewrite(gpu_folder / "operators.json", edit, tmp_path / "bad.json")
    with pytest.raises(ResultsError) as raised:
        results.load(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert field in message
    assert given in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "content",
    [b'{"gptfast_results": 1, ', b"", b"[" * 100_000, b"[1]", b"\xff\xfe", None],
    ids=["truncated", "empty", "deep", "list", "binary", "absent"],
)
def test_load_rejects_unreadable_files_in_one_line(tmp_path, content):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ResultsError, match=rf"^{re.escape(str(path))}: [^\n]+$"):
        results.load(path)


def test_load_skips_bad_files_of_a_folder(gpu_folder, fixtures):
    folder = fixtures / "fixture-gpu"
    (folder / "foreign.json").write_text("{}")
    run = results.load(folder)
    assert len(run.rows) == len(results.load(gpu_folder).rows)
    (problem,) = run.problems
    assert problem.startswith(f"{folder / 'foreign.json'}: gptfast_results")


def test_load_takes_one_device_from_a_folder(fixtures):
    """The one it is named after, though the other is newer."""
    folder = fixtures / "fixture-gpu"
    (fixtures / "fixture-cpu" / "all.json").rename(folder / "astray.json")
    run = results.load(folder)
    assert run.machine.device == "Fixture GPU"
    assert run.problems == [f"{folder / 'astray.json'}: measured on Fixture CPU; accepted in its folder: Fixture GPU"]


def test_load_rejects_a_folder_without_results(tmp_path):
    with pytest.raises(ResultsError, match=re.escape(str(tmp_path))):
        results.load(tmp_path)


def test_measuring_imports_no_pandas(gpu_folder):
    """A gpu_folder machine may lack the report's packages."""
    modules = "accuracy gpu_check profiling tune conftest vs_nanogpt.compare vs_nanogpt.learning_curves"
    imports = "; ".join(f"import benchmarks.{module}" for module in modules.split())
    code = f"import sys; {imports}; sys.exit(any(name in sys.modules for name in ('pandas', 'jinja2', 'pydantic')))"
    subprocess.run([sys.executable, "-c", code], check=True)
