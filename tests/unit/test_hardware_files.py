"""Hardware files: what ships, what is refused, and that every figure says where it comes from."""

import copy
import json
from importlib import resources

import pytest

from quern.advisor.forecasting.losses import losses
from quern.advisor.forecasting.machines import load_machine, machine_names, parsed
from quern.advisor.forecasting.runtimes import known, reach_of
from quern.core.errors import BadFileError, UserError
from quern.core.recipe import profile_names

KINDS = {"server-2-core": "cpu", "desktop-16-core": "cpu", "gpu-24gb": "cuda", "gpu-80gb": "cuda",
         "apple-laptop-64gb": "metal", "raspberry-pi-5": "cpu"}  # fmt: skip


def content(name):
    return json.loads((resources.files("quern.hardware") / f"{name}.json").read_text("utf-8"))


def test_these_ship():
    assert machine_names() == sorted(KINDS)
    assert {name: load_machine(name)[1].kind for name in machine_names()} == KINDS


@pytest.mark.parametrize("name", sorted(KINDS))
def test_measured_figures_say_when_and_how(name):
    def figures(node):
        if isinstance(node, dict) and "basis" in node:
            yield node
        elif isinstance(node, dict):
            for child in node.values():
                yield from figures(child)

    found = list(figures(content(name)))
    assert len(found) >= 5
    for one in found:
        if one["basis"] == "measured":
            assert "benchmarks/" in one["source"] or one["value"] == 1, one


def test_the_machine_with_measured_kernels_has_what_predictions_need():
    _, machine = load_machine("server-2-core")
    assert machine.calibration_share is not None
    assert set(machine.kernels) == set(machine.prompt_kernels)
    assert {"integer4", "integer8", "trellis 3-bit, 1 table", "q4_k"} <= set(machine.kernels)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cores": 0}, r"cores: .*greater than or equal to 1 \(allowed: 1 to 4096\); it is '0'"),
        ({"cores": 10**6}, r"cores: .*less than or equal to 4096"),
        ({"clock_ghz": 4800}, r"clock_ghz: .*\(allowed: 0.1 to 10\); it is '4800'"),
        ({"kind": "tpu"}, "kind: "),
        ({"bandwith": 3}, "bandwith: "),
        ({"memory": {"value": 24, "basis": "published", "source": "the box it came in"}}, r"memory.value: .*2\^50 bytes"),
        ({"memory": {"value": 24 << 30, "basis": "published"}}, "memory.source: "),
        ({"read": {"value": 1e9, "basis": "measured", "source": "bytes, not 10^9"}}, r"read.value: .*\(allowed: 0.05 to 10\^7\)"),
        ({"read": {"value": -5, "basis": "measured", "source": "a clock that jumped"}}, "read.value: "),
        ({"read": {"value": float("nan"), "basis": "measured", "source": "a clock that jumped"}}, "holds NaN"),
        ({"usable_memory": {"value": 90, "basis": "published", "source": "percent, it seems"}}, r"usable_memory.value: .*0.01 to 4"),
        ({"products": {}}, "products must name"),
        ({"products": {"int3": {"value": 1, "basis": "measured", "source": "no such thing"}}}, "products.int3"),
    ],
)  # fmt: skip
def test_absurd_values_are_refused_with_the_field_and_its_range(tmp_path, change, said):
    data = {**content("gpu-24gb"), **change}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(data), "utf-8")
    with pytest.raises(BadFileError, match=said) as caught:
        load_machine(path)
    assert str(path) in str(caught.value)


def test_a_file_of_ones_own_is_read_and_named_by_its_stem(tmp_path):
    data = copy.deepcopy(content("gpu-24gb"))
    data["memory"]["value"] = 48 << 30
    (tmp_path / "two-cards.json").write_text(json.dumps(data), "utf-8")
    name, machine = load_machine(tmp_path / "two-cards.json")
    assert (name, machine.memory.value, machine.limit) == ("two-cards", 48 << 30, int(0.9 * (48 << 30)))


def test_what_is_no_file_and_no_name_is_refused_with_the_names():
    with pytest.raises(UserError, match="neither a file nor one of apple-laptop-64gb, .*did you mean 'gpu-24gb'"):
        load_machine("gpu-24g")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": NaN}', "\x00"])
def test_damaged_files_are_refused(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text, "utf-8")
    with pytest.raises(BadFileError):
        load_machine(path)


def test_a_list_is_no_machine():
    with pytest.raises(BadFileError, match="the file: "):
        parsed([1], "x")


def test_the_longest_beginning_says_what_a_runtime_reaches():
    assert "iq2" not in reach_of("llama.cpp", "cpu", "iq4_nl").weights
    assert reach_of("llama.cpp", "cpu", "iq4_nl") != reach_of("llama.cpp", "cpu", "iq2_xxs")
    assert reach_of("llama.cpp", "cuda", "trellis 3-bit, 1 table") is None
    assert reach_of("vllm", "metal", "integer4") is None


def test_shares_of_a_bandwidth_are_below_one():
    for entry in known().runtimes:
        assert entry.decode.value <= 1
        assert entry.prefill is None or entry.prefill.value <= 1
        assert len(entry.decode.source) > 20


def test_losses_are_those_of_shipped_recipes():
    found = losses()
    assert set(found.recipes) <= set(profile_names())
    costs = [found.cost(name) for name in ("fast", "balanced", "compact")]
    assert costs == sorted(costs)
    assert found.cost("ternary") is None
