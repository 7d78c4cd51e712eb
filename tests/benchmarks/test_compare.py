import shutil
from pathlib import Path

import pytest

from benchmarks import compare


@pytest.fixture(scope="session")
def file(gpu_folder) -> Path:
    return gpu_folder / "operators.json"


@pytest.fixture
def run(capsys):
    """Exit status, what was printed and the errors of a comparison."""

    def compared(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            compare.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return compared


@pytest.fixture
def slower(tmp_path, rewrite, file):
    """The fixture's file with its first row slower by a factor."""

    def write(factor: float) -> Path:
        def edit(data):
            seconds = data["benchmarks"][0]["extra_info"]["seconds"]
            seconds.update({name: value * factor for name, value in seconds.items()})

        return rewrite(file, edit, tmp_path / "new.json")

    return write


def verdict(printed: str) -> str:
    """Ratio and verdict of the first row, the one that changed."""
    line = next(line for line in printed.splitlines() if "bfloat16 32768x768" in line and " eager  " in line)
    assert line.startswith("layer_norm")
    return " ".join(line.split()[9:])


def test_compare_of_equal_results(run, file):
    status, printed, _ = run(file, file)
    assert status == 0
    assert "Fixture GPU: 121 rows compared, 0 slower by more than 5 % and by more than noise" in printed
    assert "only in" not in printed


# the spread of a row is from 0.985 to 1.025 of its median: slowdowns of up to 4.06 % are within noise
@pytest.mark.parametrize(
    ("factor", "threshold", "status", "expected"),
    [
        (1.055, None, 1, "1.05 REGRESSION"),
        (1.045, None, 0, "1.04"),
        (1.045, 0.02, 1, "1.04 REGRESSION"),
        (1.035, 0.02, 0, "1.03 slower, within noise"),
        (1.06, 0.1, 0, "1.06"),
        (0.5, 0.05, 0, "0.50 faster"),
        (0.97, 0.02, 0, "0.97 faster, within noise"),
    ],
)
def test_regression_exceeds_threshold_and_noise(run, slower, factor, threshold, status, expected, file):
    options = [] if threshold is None else ["--threshold", threshold]
    got, printed, _ = run(file, slower(factor), *options)
    assert verdict(printed) == expected
    assert got == status


def test_compare_lists_rows_of_one_side(run, tmp_path, rewrite, file):
    fewer = rewrite(file, lambda data: data["benchmarks"].pop(0), tmp_path / "new.json")
    line = "  layer_norm, bfloat16 32768x768, forward, eager"
    for sides in ((file, fewer), (fewer, file)):
        status, printed, _ = run(*sides)
        assert status == 0
        assert f"only in {file}:\n{line}\n" in printed


def test_compare_merges_folders(run, file):
    status, printed, _ = run(file.parent, file)
    assert status == 0
    assert f"only in {file.parent}:" in printed


def test_compare_takes_the_only_device_of_a_folder(run, fixtures, tmp_path):
    device = fixtures / "fixture-gpu"
    shutil.copytree(device, tmp_path / "all/fixture-gpu")
    assert run(str(tmp_path / "all"), str(device)) == run(str(device), str(device))
    shutil.copytree(device, tmp_path / "all/other")
    status, _, err = run(str(tmp_path / "all"), str(device))
    assert status == 2
    assert "all has results of several devices; accepted: one of " in err


def test_compare_rejects_what_it_cannot_compare(run, fixtures, rewrite, tmp_path, file):
    def fails(old, new, *options) -> str:
        status, printed, error = run(old, new, *options)
        assert (status, printed) == (2, "")
        assert error.count("\n") == 1
        return error

    cpu, models = fixtures / "fixture-cpu", fixtures / "fixture-gpu" / "models.json"
    error = fails(file, cpu)
    assert f"different devices: {file} is of Fixture GPU, {cpu} of Fixture CPU" in error
    assert f"{tmp_path / 'absent.json'}: cannot be read" in fails(file, tmp_path / "absent.json")
    (cpu / "cut.json").write_text('{"a')
    assert f"{cpu / 'cut.json'}: " in fails(cpu, cpu / "all.json")
    rewrite(models, lambda data: data["benchmarks"].pop(0))  # its one row of layer norm
    assert f"no row is in both {file} and {models}" in fails(file, models)
    assert "--threshold is -0.1; accepted: a finite number of at least 0" in fails(file, file, "--threshold", "-0.1")
    assert "--threshold is nan" in fails(file, file, "--threshold", "nan")


def test_help_states_the_rule(run):
    status, printed, _ = run("--help")
    assert status == 0
    assert "its new p20 lies above its old p80" in " ".join(printed.split())
