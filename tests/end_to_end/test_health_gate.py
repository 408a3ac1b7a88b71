"""Blocks that are not fit for use: the run stops with the tensor's name, stores that linear otherwise, or goes on."""

import json

import pytest
from artifacts import small_recipe, stored_schemes
from safetensors.torch import load_file, save_file
from tiny_model import calibration_text, tiny_config, write_model
from typer.testing import CliRunner

import quern
from quern.cli.main import app
from quern.core.errors import UnhealthyError, UserError
from quern.core.progress import Silent
from quern.pipeline.blockwise import blocks
from quern.pipeline.blockwise.safeguards import gate
from quern.quantization.health import Standing

DOWN = "model.layers.{}.mlp.down_proj"
COARSE = {"weights": {"bits": 4, "granularity": "tensor", "observer": "min_max"}}
GPTQ = {"rounding": {"method": "gptq"}, "calibration": {"token_weight": "none", "tokens": 128, "sequence_length": 32}}


class Listener(Silent):
    def __init__(self):
        self.said = []

    def log(self, message):
        self.said.append(message)


def model_with(folder, change, **config):
    """A tiny model of which ``change`` has changed the weights."""
    write_model(folder, tiny_config(**config))
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder.parent / "text.txt").write_text(calibration_text()[:8000], "utf-8")
    return folder


def run(model, output, policy="stop", recipe=COARSE, **options):
    listener = Listener()
    chosen = small_recipe(**{**GPTQ, **recipe})
    text = model.parent / "text.txt"
    report = quern.quantize(
        model, output, recipe=chosen, calibration=[text], on_unhealthy=policy, progress=listener, **options
    )
    return report, listener.said


def coarse_down_proj(weights):
    """A large weight behind an input that never fires makes one scale too coarse for all the others."""
    weights["model.layers.4.mlp.up_proj.weight"][5] = 0
    weights["model.layers.4.mlp.down_proj.weight"][3, 5] = 30.0


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A model whose fifth down_proj comes out useless by ``COARSE``; and a run that stopped there."""
    folder = tmp_path_factory.mktemp("gate")
    model = model_with(folder / "model", coarse_down_proj, num_hidden_layers=5, hidden_size=32, intermediate_size=48)
    with pytest.raises(UnhealthyError) as caught:
        run(model, folder / "stopped")
    return model, caught.value


def test_it_stops_with_the_tensor_and_what_goes_on(damaged, tmp_path):
    model, error = damaged
    said = error.on_command_line
    assert said.startswith(f"{DOWN.format(4)}: its relative error is 0.9")
    assert "times that of the same linear in the 4 blocks before it (0.0" in said
    assert "the 4 blocks before it are kept" in said
    assert "--on-unhealthy repair to store that linear otherwise, or with --on-unhealthy warn" in said
    assert error.exit_code == 2
    (job,) = quern.status(model.parent / "stopped").jobs
    assert (job.blocks, job.last_step, job.process) == (4, "block 3", None)
    assert not (model.parent / "stopped").exists()


def test_a_stopped_run_goes_on_with_another_policy(damaged):
    model, _ = damaged
    output = model.parent / "stopped"
    report, said = run(model, output, "warn")
    assert report.resumed
    assert any(DOWN.format(4) in line and "relative error" in line for line in said)
    (found,) = json.loads((output / "quern.json").read_text("utf-8"))["health"]
    assert (found["tensor"], found["kind"], found["remedy"]) == (DOWN.format(4), "damaged", None)
    assert stored_schemes(output)[DOWN.format(4)].params.bits == 4
    assert any(DOWN.format(4) in note for note in quern.inspect(output).notes)
    again, _ = run(model, output)
    assert any("relative error" in note for note in again.notes), "a finished artifact still says it"


def test_a_repaired_linear_has_eight_bits_and_says_so(damaged, tmp_path):
    model, _ = damaged
    report, said = run(model, tmp_path / "out", "repair")
    by_name = {layer.linear: layer for layer in report.layers}
    assert by_name[DOWN.format(4)].relative_error < 0.01
    assert by_name[DOWN.format(4)].bits_per_weight > 8
    schemes = stored_schemes(tmp_path / "out")
    assert {name: scheme.params.bits for name, scheme in schemes.items() if scheme.params.bits != 4} == {
        DOWN.format(4): 8
    }
    (found,) = json.loads((tmp_path / "out" / "quern.json").read_text("utf-8"))["health"]
    assert found["remedy"] == "it was stored as integer 8 bits, granularity channel, rounded to nearest"
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")])
    assert "it was stored as integer 8 bits" in " ".join(shown.output.split())
    assert any("it was stored" in line for line in said)
    assert quern.generate(tmp_path / "out", "def", max_tokens=3, seed=1)


def test_inputs_that_never_fire_are_told_and_nothing_else(tmp_path):
    model = model_with(
        tmp_path / "model",
        lambda weights: weights["model.layers.1.input_layernorm.weight"].__setitem__(slice(2), 0),
        num_hidden_layers=2,
    )
    report, said = run(model, tmp_path / "out", recipe={"weights": {"bits": 4, "group_size": 32}})
    wanted = (
        "model.layers.1.self_attn.q_proj: 2 of its 64 inputs (and of 2 linears that share them) were zero for all 128"
    )
    assert [line for line in said if "inputs" in line] == [
        f"block 1: {note}" for note in report.notes if wanted in note
    ]
    assert len([note for note in report.notes if wanted in note]) == 1
    assert "health" not in json.loads((tmp_path / "out" / "quern.json").read_text("utf-8"))


FORMATS = {
    "quern": {"weights": {"bits": 4, "group_size": 32}, "transforms": [{"method": "hadamard"}]},
    "compressed-tensors": {"weights": {"bits": 4, "group_size": 32}},
    "gptq": {"weights": {"bits": 4, "group_size": 32}},
    "awq": {"weights": {"bits": 4, "group_size": 32, "symmetric": False}},
    "gguf": {"weights": {"codec": "ggml", "type": "q4_0"}},
    "onnx": {"weights": {"bits": 4, "group_size": 32}},
}
BECOMES = {
    "quern": (8, False),
    "compressed-tensors": (8, True),
    "gptq": (16, True),
    "awq": (16, True),
    "gguf": (8.5, False),
    "onnx": (8, False),
}
"""Bits of the queries, and whether keys and values have them too."""


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_stores_the_best_that_it_can(format, tmp_path, monkeypatch):
    """As if queries were damaged in four bits; keys and values go along where a runtime joins them."""

    def judged(error, role, before, comparisons):
        return Standing("damaged" if role.endswith("q_proj") and error > 1e-3 else "healthy", 1e-4)

    monkeypatch.setattr(gate, "standing", judged)
    monkeypatch.setattr(gate.Gate, "_before", {"self_attn.q_proj": []})
    config = {"num_hidden_layers": 1, "torch_dtype": "float16" if format in ("gptq", "awq") else "bfloat16"}
    model = model_with(tmp_path / "model", lambda weights: None, **config)
    output = tmp_path / ("out.gguf" if format == "gguf" else "out")
    report, _ = run(model, output, "repair", FORMATS[format], format=format)
    (note,) = [note for note in report.notes if "q_proj" in note]
    bits, joined = BECOMES[format]
    assert ("unquantized" if bits == 16 else "integer 8 bits") in note
    assert ("as were" in note) == joined
    if format != "onnx":  # which quern does not open
        rows = {row.name: row.bits for row in quern.inspect(output).tensors}
        assert rows["model.layers.0.self_attn.q_proj.weight"] == bits
        assert (rows["model.layers.0.self_attn.k_proj.weight"] == bits) == joined
        assert rows["model.layers.0.mlp.up_proj.weight"] < 5
        assert quern.generate(output, "def", max_tokens=3, seed=1)


def overflowing(size):
    """The last block's up_proj so large that its outputs are of about ``size``; down_proj makes up for it."""

    def change(weights):
        weights["model.layers.1.mlp.up_proj.weight"] *= size
        weights["model.layers.1.mlp.down_proj.weight"] /= size

    return change


FINE = {"weights": {"bits": 8, "granularity": "channel"}}


def test_squares_that_overflow_are_rounded_to_nearest_if_wanted(tmp_path):
    model = model_with(tmp_path / "model", overflowing(1e19), num_hidden_layers=2)
    with pytest.raises(UnhealthyError, match=r"layers\.1\.mlp\.down_proj: .*overflow float32.*on_unhealthy='repair'"):
        run(model, tmp_path / "out", recipe=FINE)
    with pytest.raises(UnhealthyError):
        run(model, tmp_path / "out", "warn", recipe=FINE)
    report, _ = run(model, tmp_path / "out", "repair", recipe=FINE)
    (found,) = json.loads((tmp_path / "out" / "quern.json").read_text("utf-8"))["health"]
    assert (found["tensor"], found["kind"]) == (DOWN.format(1), "no Hessian")
    assert "rounded to nearest" in found["remedy"]
    assert report.resumed


def test_weights_that_are_no_numbers_are_rounded_another_way_or_end_the_run(tmp_path, monkeypatch):
    """As if error feedback had gone astray in one linear of the second block."""
    rounded = blocks.round_linears

    def astray(weights, plans, *given):
        found = rounded(weights, plans, *given)
        for linear in found:
            if given[3] == "model.layers.1." and "up_proj" in linear.name and linear.plan.rounding.method == "gptq":
                linear.decoded[3, 5] = float("nan")
        return found

    monkeypatch.setattr(blocks, "round_linears", astray)
    model = model_with(tmp_path / "model", lambda weights: None, num_hidden_layers=2)
    for policy in ("stop", "warn"):
        with pytest.raises(UnhealthyError, match=r"layers\.1\.mlp\.up_proj: 1 of its 6,144 weights are NaN") as caught:
            run(model, tmp_path / "out", policy, recipe=FINE)
        assert "repair" in str(caught.value)
        assert "warn" not in str(caught.value)
    run(model, tmp_path / "out", "repair", recipe=FINE)
    (found,) = json.loads((tmp_path / "out" / "quern.json").read_text("utf-8"))["health"]
    assert (found["tensor"], found["kind"]) == ("model.layers.1.mlp.up_proj", "not finite")
    assert found["remedy"] == "it was stored as integer 8 bits, granularity channel, rounded to nearest"


def test_outputs_that_are_no_numbers_end_the_run_even_where_it_repairs(tmp_path):
    def change(weights):
        weights["model.layers.0.post_attention_layernorm.weight"][:] = 3e19  # gate x up is beyond float32

    model = model_with(tmp_path / "model", change, num_hidden_layers=2)
    with pytest.raises(UnhealthyError, match=r"block 0 \(model\.layers\.0\): .* outputs are NaN or infinite"):
        run(model, tmp_path / "out", "repair", recipe=FINE)
    for policy in ("stop", "warn"):
        with pytest.raises(UnhealthyError, match=r"model\.layers\.0\."):
            run(model, tmp_path / "out", policy, recipe=FINE)


@pytest.mark.parametrize(("dtype", "stops"), [("float16", True), ("bfloat16", False)])
def test_values_beyond_float16_where_the_model_runs_in_it(dtype, stops, tmp_path):
    model = model_with(tmp_path / "model", overflowing(2.0**15), num_hidden_layers=2, torch_dtype=dtype)
    if not stops:
        assert "health" not in json.dumps(run(model, tmp_path / "out", recipe=FINE)[0].notes)
        return
    with pytest.raises(
        UnhealthyError, match=r"model\.layers\.1: values up to .* runs in float16 here.*65504"
    ) as caught:
        run(model, tmp_path / "out", recipe=FINE)
    assert "repair" not in str(caught.value), "weights cannot mend it"
    report, _ = run(model, tmp_path / "out", "warn", recipe=FINE)
    assert any(
        "beyond" in json.dumps(one) for one in json.loads((report.path / "quern.json").read_text("utf-8"))["health"]
    )


def test_an_unknown_policy_is_refused(tmp_path):
    with pytest.raises(UserError, match="on_unhealthy is 'repare'; it must be one of stop, repair, warn.*repair"):
        quern.quantize("nowhere", tmp_path / "out", on_unhealthy="repare")
