"""How launch configurations are chosen, on a GPU that is made up: what a launch takes is told by `times`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from kernels import tuning
from kernels.tuning import TUNABLES, Tunable

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
RULE, SECOND, THIRD = {"BM": 16}, {"BM": 32}, {"BM": 64}


@pytest.fixture
def times(monkeypatch, tmp_path):
    """Milliseconds by block size, and a GPU that needs them."""
    milliseconds = {16: 3.0, 32: 2.0, 64: 1.0}

    def measure(run):
        run()
        return milliseconds[run.args[0]["BM"]]

    monkeypatch.setattr(tuning, "_milliseconds", measure)
    monkeypatch.setattr(tuning, "TUNABLES", {})
    monkeypatch.setattr(tuning, "TABLES", tmp_path / "tables")
    monkeypatch.setenv("GPTFAST_CACHE", str(tmp_path / "cache"))
    properties = SimpleNamespace(major=9, minor=0, gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 (made up)")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))
    tuning._architecture.cache_clear()
    tuning._table.cache_clear()
    yield milliseconds
    tuning._architecture.cache_clear()
    tuning._table.cache_clear()


@pytest.fixture
def tunable(times):
    return Tunable("matmul", lambda *problem: [RULE, SECOND, RULE, THIRD])


def chosen(tunable: Tunable, *problem: object, device: torch.device = GPU) -> dict:
    launched = []

    def run(options):
        launched.append(options)
        return "the result"

    assert tunable.launch(run, device, *(problem or (768, torch.bfloat16))) == "the result"
    return launched[-1]


def put_table(name: str, problem: str, options: dict, architecture: str = "sm_90") -> None:
    tuning.TABLES.mkdir(exist_ok=True)
    table = {"launches": {name: {problem: options}}}
    (tuning.TABLES / f"{architecture}.json").write_text(json.dumps(table))
    tuning._table.cache_clear()


def test_the_rule_decides_where_nobody_measured(tunable):
    assert chosen(tunable) == RULE
    assert tunable.candidates(GPU, 768, torch.bfloat16) == [RULE, SECOND, THIRD]
    assert not tuning.cache_file(GPU).exists()


def test_the_rule_is_told_the_architecture_and_the_problem(times):
    asked = []
    tunable = Tunable("norm", lambda *problem: asked.append(problem) or [RULE])
    chosen(tunable, 768, torch.bfloat16, True)
    chosen(tunable, 768, torch.bfloat16, True)  # decided once
    with tuning.assume_architecture("gfx942"):
        chosen(tunable, 768, torch.bfloat16, True)
    chosen(tunable, 1, device=CPU)
    assert asked == [
        ("sm_90", 768, torch.bfloat16, True),
        ("gfx942", 768, torch.bfloat16, True),
        ("none", 1),
    ]


def test_amd_gpus_have_the_names_of_their_instruction_sets(times, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert tuning.architecture(GPU) == "gfx942"


def test_the_table_of_the_architecture_is_used_for_its_problems(tunable):
    put_table("matmul", "768 bfloat16", SECOND)
    assert chosen(tunable) == SECOND
    assert chosen(tunable, 768, torch.float16) == RULE
    assert chosen(Tunable("other", lambda *problem: [RULE, SECOND])) == RULE
    with tuning.assume_architecture("sm_80"):
        assert chosen(tunable) == RULE


def test_an_entry_that_is_no_candidate_any_more_is_passed_over(tunable):
    put_table("matmul", "768 bfloat16", {"BM": 32, "GROUP": 8})
    assert chosen(tunable) == RULE


def test_tuning_takes_the_fastest_and_keeps_it(tunable, times):
    assert chosen(tunable) == RULE
    with tuning.autotune():
        assert chosen(tunable) == THIRD
        assert chosen(tunable, 1024, torch.bfloat16) == THIRD
    assert chosen(tunable) == THIRD
    content = json.loads(tuning.cache_file(GPU).read_text())
    assert content["launches"] == {"matmul": {"768 bfloat16": THIRD, "1024 bfloat16": THIRD}}
    assert (content["device"], content["architecture"]) == ("NVIDIA H200 (made up)", "sm_90")
    assert {"torch", "triton", "date"} <= set(content)
    # another process: what was kept is found, measured or not, before the table
    put_table("matmul", "768 bfloat16", SECOND)
    times.clear()
    tunable.clear()
    assert chosen(tunable) == THIRD
    with tuning.autotune():
        assert chosen(tunable) == THIRD


def test_a_measurement_is_told_with_the_times_of_all_candidates(tunable):
    told = []
    with tuning.on_measured(lambda *measurement: told.append(measurement)):
        chosen(tunable)
        assert told == []  # nothing was measured
        with tuning.autotune():
            chosen(tunable)
            chosen(tunable)
    with tuning.autotune():
        chosen(tunable, 1024, torch.bfloat16)
    assert told == [("matmul", "768 bfloat16", [(RULE, 3.0), (SECOND, 2.0), (THIRD, 1.0)])]


def test_what_other_processes_kept_meanwhile_stays(tunable, times):
    with tuning.autotune():
        chosen(tunable)
    other = Tunable("other", lambda *problem: [RULE, SECOND])
    with tuning.autotune():
        chosen(other)
    assert set(json.loads(tuning.cache_file(GPU).read_text())["launches"]) == {"matmul", "other"}
    assert [path.name for path in tuning.cache_file(GPU).parent.iterdir()] == [tuning.cache_file(GPU).name]


def test_other_gpus_and_other_tritons_have_files_of_their_own(times, monkeypatch):
    first = tuning.cache_file(GPU)
    assert first.name.startswith("NVIDIA-H200-made-up-")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    second = tuning.cache_file(GPU)
    monkeypatch.setattr(tuning.triton, "__version__", "9.9.9")
    assert len({first, second, tuning.cache_file(GPU)}) == 3


def test_without_a_folder_of_its_own_the_cache_is_where_caches_are(times, monkeypatch, tmp_path):
    monkeypatch.delenv("GPTFAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning.cache_file(GPU).parent == tmp_path / "xdg/gptfast/launches"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.cache_file(GPU).parent == tmp_path / ".cache/gptfast/launches"


def test_a_candidate_that_does_not_fit_loses(tunable, times, monkeypatch):
    def measure(run, measure=tuning._milliseconds):
        if run.args[0]["BM"] >= smallest:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return measure(run)

    monkeypatch.setattr(tuning, "_milliseconds", measure)
    smallest = 64
    with tuning.autotune():
        assert chosen(tunable) == SECOND
    smallest = 16
    with (
        tuning.autotune(),
        pytest.raises(RuntimeError, match="matmul: none of 3 launch configurations fits this GPU"),
    ):
        chosen(tunable, 1)


def test_nothing_is_measured_inside_a_capture(tunable, monkeypatch):
    with tuning.autotune():
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert chosen(tunable) == RULE
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert chosen(tunable) == THIRD


def test_a_single_candidate_and_other_devices_need_no_measurement(times):
    times.clear()
    alone = Tunable("alone", lambda *problem: [RULE])
    with tuning.autotune():
        assert chosen(alone) == RULE
        assert chosen(Tunable("two", lambda *problem: [RULE, SECOND]), device=CPU) == RULE
    assert not tuning.cache_file(GPU).exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"launches": 3}', '{"launches": {"matmul": 3}}'])
def test_a_damaged_cache_is_said_and_replaced(tunable, content):
    path = tuning.cache_file(GPU)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.warns(UserWarning, match="cannot read the tuned launches in"):
        assert chosen(tunable) == RULE
    with tuning.autotune(), pytest.warns(UserWarning, match="cannot read"):
        assert chosen(tunable) == THIRD
    tunable.clear()
    assert chosen(tunable) == THIRD


def test_a_cache_that_cannot_be_written_is_said(tunable, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GPTFAST_CACHE", str(tmp_path / "file"))
    with tuning.autotune():
        with pytest.warns(UserWarning, match="cannot save tuned launches in .*Not a directory"):
            assert chosen(tunable) == THIRD
        assert chosen(tunable) == THIRD  # in memory still


def test_forced_and_numbered_configurations_last_as_long_as_they_are_asked_for(tunable):
    with tuning.autotune():
        chosen(tunable)
    with tuning.forced({"matmul": {"BM": 128}}):
        assert chosen(tunable) == {"BM": 128}
    assert [number(tunable, index) for index in range(4)] == [RULE, SECOND, THIRD, THIRD]
    assert chosen(tunable) == THIRD


def number(tunable: Tunable, index: int) -> dict:
    with tuning.candidate(index):
        return chosen(tunable)


@pytest.mark.parametrize(("value", "requested"), [("1", True), ("0", False), ("", False), (None, False)])
def test_the_environment_can_ask_for_tuning(value, requested):
    environment = {name: text for name, text in os.environ.items() if name != "GPTFAST_AUTOTUNE"}
    if value is not None:
        environment["GPTFAST_AUTOTUNE"] = value
    command = [sys.executable, "-c", "from kernels import tuning; print(tuning._requested)"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == f"{requested}\n"


PROBLEMS = {
    "layer_norm_forward": [(width, torch.bfloat16, True, True) for width in (1, 768, 8192, 65_536)],
    "layer_norm_backward": [(width, torch.bfloat16, True, True) for width in (1, 768, 8192, 65_536)],
    "layer_norm_parameters": [(65_536, torch.bfloat16)],
    "cross_entropy": [(classes, torch.bfloat16, True) for classes in (65, 50_257)],
    "ffn_up": [
        (1024, width, dtype, "gelu", True, True, aligned, implementation)
        for width in (768, 4096)
        for dtype in (torch.bfloat16, torch.float32)
        for aligned in (True, False)
        for implementation in ("auto", "fused", "unfused")
    ],
    "ffn_down_backward": [(1024, 768, torch.bfloat16, "gelu", True, True, "auto")],
    "ffn_activation": [(torch.bfloat16,)],
    "ffn_activation_backward": [(torch.bfloat16,)],
    **{
        f"attention_{name}": [
            (head_size, 1024, dtype, dropout, described)
            for head_size in (64, 128, 256)
            for dtype in (torch.bfloat16, torch.float32)
            for dropout in (False, True)
            for described in (False, True)
        ]
        for name in ("forward", "dk_dv", "dq")
    },
    "int8_row": [(outputs, width, torch.bfloat16) for outputs in (1, 768, 50_257) for width in (1, 768, 6400)],
    "int8_rows": [(outputs, rows, torch.bfloat16) for outputs in (1, 768, 50_257) for rows in (16, 32, 64)],
    "decode": [(head_size, 1024, 12, torch.bfloat16) for head_size in (16, 64, 256)],
}


def test_no_launch_has_more_candidates_than_are_tested():
    """Each operator is tested with the candidates 0 to 3."""
    import kernels.attention
    import kernels.cross_entropy
    import kernels.decode
    import kernels.ffn
    import kernels.int8
    import kernels.norm  # noqa: F401

    assert set(PROBLEMS) == set(TUNABLES)
    for architecture in ("none", "sm_80", "sm_90", "sm_100", "sm_120", "gfx942"):
        for name, problems in PROBLEMS.items():
            for problem in problems:
                with tuning.assume_architecture(architecture):
                    assert 1 <= len(TUNABLES[name].candidates(CPU, *problem)) <= 4


@pytest.mark.parametrize("path", sorted(tuning.TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_a_table_that_comes_with_the_package_says_where_it_was_measured(path):
    content = json.loads(path.read_text())
    assert content["architecture"] == path.stem
    assert {"device", "torch", "triton", "date"} <= set(content)
    assert set(content["launches"]) <= set(TUNABLES)
