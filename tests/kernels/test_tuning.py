"""Selection of launch configurations, on a simulated GPU whose times by block size are `times`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from kernels import operators, tuning
from kernels.tuning import TUNABLES, Tunable

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
RULE, SECOND, THIRD = {"BM": 16}, {"BM": 32}, {"BM": 64}
KEY = (768, torch.bfloat16)


@pytest.fixture
def times(monkeypatch, tmp_path):
    """Milliseconds by block size; infinity is a launch that does not fit."""
    milliseconds = {16: 3.0, 32: 2.0, 64: 1.0}

    def do_bench(run, **kwargs):
        run()
        if (measured := milliseconds[run.args[0]["BM"]]) == float("inf"):
            raise OutOfResources(300_000, 232_448, "shared memory")
        return measured

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
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
    return Tunable("matmul", lambda *key: [RULE, SECOND, RULE, THIRD])


def chosen(tunable: Tunable, *key: object, device: torch.device = GPU) -> dict:
    """The configuration of the last launch."""
    launched = []

    def run(config):
        launched.append(config)
        return "the result"

    assert tunable.launch(run, device, *(key or KEY)) == "the result"
    return launched[-1]


def put_table(config: dict) -> None:
    tuning.TABLES.mkdir(exist_ok=True)
    table = {"launches": {"matmul": {"768 bfloat16": config}}}
    (tuning.TABLES / "sm_90.json").write_text(json.dumps(table))
    tuning._table.cache_clear()


def test_rule_is_the_default(tunable):
    assert chosen(tunable) == RULE
    assert tunable.candidates(GPU, *KEY) == [RULE, SECOND, THIRD]
    assert not tuning.cache_file(GPU).exists()


def test_rule_gets_the_architecture_and_the_key_once(times):
    calls = []
    tunable = Tunable("norm", lambda *key: calls.append(key) or [RULE])
    chosen(tunable, 768, True)
    chosen(tunable, 768, True)
    with tuning.assume_architecture("gfx942"):
        chosen(tunable, 768, True)
    chosen(tunable, 1, device=CPU)
    assert calls == [("sm_90", 768, True), ("gfx942", 768, True), ("none", 1)]


def test_architecture_of_amd_is_its_instruction_set(times, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert tuning.architecture(GPU) == "gfx942"


def test_table_applies_to_its_launch_key_and_architecture(tunable):
    put_table(SECOND)
    assert chosen(tunable) == SECOND
    assert chosen(tunable, 768, torch.float16) == RULE
    assert chosen(Tunable("other", lambda *key: [RULE, SECOND])) == RULE
    with tuning.assume_architecture("sm_80"):
        assert chosen(tunable) == RULE


def test_outdated_table_entry_is_ignored(tunable):
    put_table({"BM": 32, "GROUP": 8})
    assert chosen(tunable) == RULE


def test_autotune_takes_the_fastest_and_saves_it(tunable, times):
    assert chosen(tunable) == RULE
    with tuning.autotune():
        assert chosen(tunable) == THIRD
        assert chosen(tunable, 1024, torch.bfloat16) == THIRD
    assert chosen(tunable) == THIRD
    content = json.loads(tuning.cache_file(GPU).read_text())
    assert content["launches"] == {"matmul": {"768 bfloat16": THIRD, "1024 bfloat16": THIRD}}
    assert (content["device"], content["architecture"]) == ("NVIDIA H200 (made up)", "sm_90")
    assert {"torch", "triton", "date"} <= set(content)
    # another process reads it before the table, and measures nothing
    put_table(SECOND)
    times.clear()
    tunable.clear()
    assert chosen(tunable) == THIRD
    with tuning.autotune():
        assert chosen(tunable) == THIRD


def test_on_measured_gets_the_times_of_all_candidates(tunable):
    measured = []
    with tuning.on_measured(lambda *measurement: measured.append(measurement)):
        chosen(tunable)
        assert measured == []
        with tuning.autotune():
            chosen(tunable)
            chosen(tunable)
    with tuning.autotune():
        chosen(tunable, 1024, torch.bfloat16)
    assert measured == [("matmul", "768 bfloat16", [(RULE, 3.0), (SECOND, 2.0), (THIRD, 1.0)])]


def test_saving_keeps_other_entries(tunable):
    with tuning.autotune():
        chosen(tunable)
        chosen(Tunable("other", lambda *key: [RULE, SECOND]))
    assert set(json.loads(tuning.cache_file(GPU).read_text())["launches"]) == {"matmul", "other"}
    assert list(tuning.cache_file(GPU).parent.iterdir()) == [tuning.cache_file(GPU)]


def test_cache_file_depends_on_the_gpu_and_on_triton(times, monkeypatch):
    first = tuning.cache_file(GPU)
    assert first.name.startswith("NVIDIA-H200-made-up-")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    second = tuning.cache_file(GPU)
    monkeypatch.setattr(tuning.triton, "__version__", "9.9.9")
    assert len({first, second, tuning.cache_file(GPU)}) == 3


def test_cache_folder_follows_xdg(times, monkeypatch, tmp_path):
    monkeypatch.delenv("GPTFAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning.cache_file(GPU).parent == tmp_path / "xdg/gptfast/launches"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.cache_file(GPU).parent == tmp_path / ".cache/gptfast/launches"


def test_candidate_that_does_not_fit_loses(tunable, times):
    times[64] = float("inf")
    with tuning.autotune():
        assert chosen(tunable) == SECOND
    times.update({16: float("inf"), 32: float("inf")})
    with tuning.autotune(), pytest.raises(RuntimeError, match=r"matmul.* 3 "):
        chosen(tunable, 1)


def test_nothing_is_measured_inside_a_capture(tunable, monkeypatch):
    with tuning.autotune():
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert chosen(tunable) == RULE
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert chosen(tunable) == THIRD


def test_single_candidates_and_cpus_are_not_measured(times):
    times.clear()
    with tuning.autotune():
        assert chosen(Tunable("one", lambda *key: [RULE])) == RULE
        assert chosen(Tunable("two", lambda *key: [RULE, SECOND]), device=CPU) == RULE
    assert not tuning.cache_file(GPU).exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"launches": 3}', '{"launches": {"matmul": 3}}'])
def test_damaged_cache_warns_and_is_replaced(tunable, content):
    path = tuning.cache_file(GPU)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.warns(UserWarning, match=path.name):
        assert chosen(tunable) == RULE
    with tuning.autotune(), pytest.warns(UserWarning, match=path.name):
        assert chosen(tunable) == THIRD
    tunable.clear()
    assert chosen(tunable) == THIRD


def test_unwritable_cache_warns(tunable, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GPTFAST_CACHE", str(tmp_path / "file"))
    with tuning.autotune():
        with pytest.warns(UserWarning, match="Not a directory"):
            assert chosen(tunable) == THIRD
        assert chosen(tunable) == THIRD  # kept in memory


def test_forced_and_numbered_configurations_end_with_their_context(tunable):
    def number(index: int) -> dict:
        with tuning.candidate(index):
            return chosen(tunable)

    with tuning.autotune():
        chosen(tunable)
    with tuning.forced({"matmul": {"BM": 128}}):
        assert chosen(tunable) == {"BM": 128}
    assert [number(index) for index in range(4)] == [RULE, SECOND, THIRD, THIRD]
    assert chosen(tunable) == THIRD


@pytest.mark.parametrize(("value", "requested"), [("1", True), ("0", False), ("", False), (None, False)])
def test_environment_variable_requests_tuning(value, requested):
    environment = {name: text for name, text in os.environ.items() if name != "GPTFAST_AUTOTUNE"}
    if value is not None:
        environment["GPTFAST_AUTOTUNE"] = value
    command = [sys.executable, "-c", "from kernels import tuning; print(tuning._requested)"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == f"{requested}\n"


@pytest.mark.parametrize("architecture", ["none", "sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_every_launch_has_one_to_four_candidates(monkeypatch, architecture):
    """Tests of the operators run the candidates 0 to 3."""
    counts: dict[str, set[int]] = {}

    def candidates(self, device, *key, original=Tunable.candidates):
        found = original(self, device, *key)
        counts.setdefault(self.name, set()).add(len(found))
        return found

    monkeypatch.setattr(Tunable, "candidates", candidates)
    for kernel in (InterpretedFunction, JITFunction):
        monkeypatch.setattr(kernel, "run", lambda *args, **kwargs: None)
    with tuning.assume_architecture(architecture):
        for dtype in (torch.float32, torch.bfloat16):
            for module in operators.modules():
                for _, function, arguments in module.codegen_cases(dtype):
                    function(*arguments)
    assert set(counts) == set(TUNABLES)
    assert set.union(*counts.values()) <= {1, 2, 3, 4}


@pytest.mark.parametrize("path", sorted(tuning.TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_packaged_table_says_where_it_was_measured(path):
    content = json.loads(path.read_text())
    assert content["architecture"] == path.stem
    assert {"device", "torch", "triton", "date"} <= set(content)
    operators.modules()
    assert set(content["launches"]) <= set(TUNABLES)
