"""The probe: what it reads, what it measures, and what it says where it cannot know."""

import json
import os
import stat
import sys
from types import SimpleNamespace

import pytest
import torch

from quern.advisor import hardware
from quern.advisor.hardware import (
    gemm_rate,
    gpus,
    instruction_sets,
    measured_rates,
    probe,
    rate_warnings,
    read_bandwidth,
)
from quern.core.machine import foreign_load
from quern.core.machine.foreign_load import ForeignLoad

X86 = "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu avx2 fma avx512f avx512vbmi avx512_vnni amx_int8 ht\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp asimdhp i8mm bf16 sve\n"


@pytest.fixture
def cpuinfo(tmp_path):
    def write(text):
        path = tmp_path / "cpuinfo"
        path.write_text(text)
        return path

    return write


def test_instruction_sets(cpuinfo, tmp_path):
    assert instruction_sets(cpuinfo(X86)) == ["avx2", "fma", "avx512f", "avx512_vnni", "avx512_vbmi", "amx_int8"]
    assert instruction_sets(cpuinfo(ARM)) == ["neon", "dotprod", "fp16", "bf16", "i8mm", "sve"]
    assert instruction_sets(cpuinfo("processor: 0\n")) == []
    assert instruction_sets(tmp_path / "none") == []


def test_it_agrees_with_torch():
    capability = torch.backends.cpu.get_cpu_capability()
    expected = {"AVX2": "avx2", "AVX512": "avx512f"}.get(capability)
    if expected is None:
        pytest.skip(f"torch names the instruction set {capability}")
    assert expected in instruction_sets()


def test_without_measuring_everything_is_plain_data():
    found = probe(measure=False)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["measured"] is None
    assert found["logical_cores"] >= found["usable_cores"] >= 1
    assert 0 < found["ram_free_bytes"] <= found["ram_bytes"] * 1.01
    assert found["architecture"]
    assert len(found["load_average"]) == 3


def test_a_containers_limits_count(monkeypatch):
    monkeypatch.setattr(hardware, "total_memory", lambda: 1 << 30)
    monkeypatch.setattr(hardware, "free_memory", lambda: 1 << 29)
    found = probe(measure=False)
    assert (found["ram_bytes"], found["ram_free_bytes"]) == (1 << 30, 1 << 29)


def test_measured_rates_by_threads(monkeypatch):
    monkeypatch.setattr(hardware, "BUFFER_BYTES", 1 << 24)
    monkeypatch.setattr(hardware, "GEMM_SHAPE", (16, 64, 64))
    before = torch.get_num_threads()
    found = measured_rates([1, 2])
    assert torch.get_num_threads() == before
    assert set(found["gemm_gop_s"]) == {"float32", "bfloat16", "int8"}
    for rates in (found["read_bandwidth_gb_s"], *found["gemm_gop_s"].values()):
        assert set(rates) == {"1", "2"}
        assert min(rates.values()) > 0
    assert found["foreign_load"] >= 0
    assert json.loads(json.dumps(found, allow_nan=False)) == found


MEASURED = {
    "foreign_load": 0.1,
    "read_bandwidth_gb_s": {"1": 10.0, "2": 12.0},
    "gemm_gop_s": {"float32": {"1": 60.0, "2": 110.0}, "bfloat16": {"1": 1261.0, "2": 1010.0}, "int8": None},
}


def test_rates_of_a_machine_that_others_use_come_with_a_warning():
    assert rate_warnings(MEASURED) == []
    (busy,) = rate_warnings({**MEASURED, "foreign_load": 1.31})
    assert busy.startswith("other programs kept 1.3 processors busy meanwhile, so these rates are not what")
    slower = {**MEASURED, "gemm_gop_s": {**MEASURED["gemm_gop_s"], "bfloat16": {"1": 1261.0, "2": 179.0}}}
    (said,) = rate_warnings(slower)
    assert said.startswith("matrix products in bfloat16: 179 with 2 threads, but 1261 with 1. Not all of these threads")
    assert rate_warnings({**slower, "foreign_load": 1.31}) == [busy], "one reason is enough"
    (said,) = rate_warnings({**MEASURED, "read_bandwidth_gb_s": {"1": 10.0, "2": 30.0, "16": 20.0}})
    assert said.startswith("reading memory: 20 with 16 threads, but 30 with 2")


def test_what_others_did_while_it_was_measured_is_told(monkeypatch):
    """And what this process did itself is none of it."""
    monkeypatch.setattr(hardware, "BUFFER_BYTES", 1 << 22)
    monkeypatch.setattr(hardware, "GEMM_SHAPE", (4, 8, 8))
    monkeypatch.setattr(foreign_load, "SHORTEST_S", 0.0)
    busy, own = iter([100.0, 107.0]), iter([10.0, 12.0])
    clock = iter([0.0, 0.0, 2.0])
    monkeypatch.setattr(foreign_load, "_busy_seconds", lambda: next(busy))
    monkeypatch.setattr(foreign_load, "_seconds_of", lambda _: next(own))
    monkeypatch.setattr(foreign_load, "time", SimpleNamespace(perf_counter=lambda: next(clock), sleep=lambda _: None))
    assert measured_rates([1])["foreign_load"] == 2.5
    monkeypatch.undo()
    monkeypatch.setattr(hardware, "measured_rates", lambda threads: {**MEASURED, "foreign_load": 2.5})
    assert probe()["warnings"] == rate_warnings({**MEASURED, "foreign_load": 2.5})
    assert probe(measure=False)["warnings"] == []


def test_a_look_is_never_too_short():
    load = ForeignLoad()
    assert load.processors() >= 0
    assert load.seconds >= foreign_load.SHORTEST_S


def test_bandwidth_is_bytes_over_seconds(monkeypatch):
    """Whatever way of reading is the faster one, by a clock of our own: 0.5 s a pass."""
    monkeypatch.setattr(hardware, "_median_seconds", lambda work, repeats: 0.5)
    assert read_bandwidth([1, 3], 1 << 20) == {1: (1 << 20) / 0.5e9, 3: (1 << 20) / 0.5e9}


def test_gemm_counts_two_operations_for_each_product(monkeypatch):
    monkeypatch.setattr(hardware, "_median_seconds", lambda work, repeats, limit_s: 2.0)
    rows, inner, columns = hardware.GEMM_SHAPE
    assert gemm_rate("float32", [1]) == {1: 2 * rows * inner * columns / 2.0 / 1e9}


def test_a_product_that_torch_lacks_is_not_measured(monkeypatch):
    def refuse(*_):
        raise RuntimeError("not implemented on this CPU")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    assert gemm_rate("int8", [1]) is None
    assert gemm_rate("float32", [1])[1] > 0


def test_median_and_the_limit_of_time(monkeypatch):
    moments = iter([0, 3, 10, 11, 20, 22, 30, 39])
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(moments))
    calls = []
    assert hardware._median_seconds(lambda: calls.append(1), 3) == 2
    assert len(calls) == 4
    assert hardware._median_seconds(lambda: None, 5, 5.0) == 9


class TestGpus:
    @pytest.fixture
    def nvidia_smi(self, tmp_path, monkeypatch):
        def install(script):
            path = tmp_path / "nvidia-smi"
            path.write_text(f"#!{sys.executable}\n{script}")
            path.chmod(path.stat().st_mode | stat.S_IEXEC)
            monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

        return install

    def test_fields(self, nvidia_smi):
        nvidia_smi("print('NVIDIA H200, 143771, 143000, 570.1, 9.0')\nprint('Old one, [N/A], [N/A], 570.1, 5.2')\n")
        assert gpus() == [
            {
                "name": "NVIDIA H200",
                "memory_bytes": 143771 << 20,
                "memory_free_bytes": 143000 << 20,
                "driver": "570.1",
                "compute_capability": "9.0",
            },
            {
                "name": "Old one",
                "memory_bytes": None,
                "memory_free_bytes": None,
                "driver": "570.1",
                "compute_capability": "5.2",
            },
        ]

    def test_a_driver_that_fails_leaves_torch_to_answer(self, nvidia_smi, monkeypatch):
        nvidia_smi("print('No devices were found'); raise SystemExit(6)")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert gpus() == []

    def test_what_torch_sees(self, monkeypatch):
        from types import SimpleNamespace

        properties = SimpleNamespace(name="Some GPU", total_memory=8 << 30, major=8, minor=6)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (7 << 30, 8 << 30))
        (gpu,) = gpus("no-such-tool")
        assert (gpu["name"], gpu["memory_bytes"], gpu["memory_free_bytes"]) == ("Some GPU", 8 << 30, 7 << 30)
        assert gpu["compute_capability"] == "8.6"


def test_kernels_are_listed_best_first():
    found = probe(measure=False)
    assert found["kernels_in_use"] in found["kernels"]
    assert found["kernels"][-1] == "scalar"
