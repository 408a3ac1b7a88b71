"""``quern forecast`` and ``quern recommend --model`` as they are called: this machine, others, and what is refused."""

import json
import math
import re
from importlib import resources

import pytest
from tiny_model import tiny_config, write_model
from typer.testing import CliRunner

import quern
from quern.advisor.forecasting.results import Forecast, Placements
from quern.cli.main import app
from quern.core.errors import UserError
from quern.core.recipe import parse_recipe
from quern.pipeline.forecasting import short_decoding, short_quantization

FIGURES = ("artifact_bytes", "quantize_seconds", "quantize_memory", "quantize_disk", "run_memory", "prefill", "decode")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(
        tmp_path_factory.mktemp("model") / "model", tiny_config(max_position_embeddings=1024, intermediate_size=128)
    )


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "400", "NO_COLOR": "1"})


@pytest.fixture(scope="module")
def here(model):
    patch = pytest.MonkeyPatch()
    patch.setattr(short_decoding, "NEW", 4)
    patch.setattr(short_quantization, "LEAST_TOKENS", 512)
    patch.setattr(short_quantization, "MOST_TOKENS", 1024)
    patch.setattr("quern.pipeline.forecasting.here.BUFFER_BYTES", 1 << 22)
    patch.setattr("quern.pipeline.forecasting.here.process_bytes", lambda subject: 300_000_000)  # starts a process
    with patch.context():
        return quern.forecast(model, recipes=["compact", "rtn4"], context=256, threads=2)


def test_this_machine_is_measured_and_nothing_is_predicted(here):
    assert here.machine.here
    assert here.context == 256
    compact, plain = here.recipes
    for one in (compact, plain):
        figures = [getattr(one, name) for name in FIGURES] + list(one.contexts.values())
        assert {figure.basis for figure in figures} == {"counted", "measured"}
        assert all(figure.value > 0 for figure in figures)
        assert (one.decode.basis, one.prefill.basis, one.quantize_seconds.basis) == ("measured",) * 3
        assert one.runtime == "quern, engine cpu"
    assert "gradients at the head" in compact.quantize_seconds.derivation
    assert "calibration" not in plain.quantize_seconds.derivation
    assert compact.quantize_seconds.value > plain.quantize_seconds.value
    assert compact.quantize_disk.value > plain.quantize_disk.value
    assert Forecast.model_validate_json(here.model_dump_json()) == here


def test_every_block_of_a_small_model_was_run(here):
    assert all(re.search(r"; 3 of the blocks were run", one.decode.derivation) for one in here.recipes)


def test_the_sum_of_what_quantizing_takes_is_its_terms(here):
    seconds = {"ms": 1e-3, "s": 1.0, "min": 60.0}
    for one in here.recipes:
        terms = re.findall(r"([\d.]+) (ms|s|min) \(", one.quantize_seconds.derivation)
        total = sum(float(number) * seconds[unit] for number, unit in terms)
        assert math.isclose(total, one.quantize_seconds.value, rel_tol=0.02)


def test_what_is_predicted_can_be_checked_by_hand(model):
    (one,) = quern.forecast(model, recipes=["rtn4"], on="desktop-16-core", context=512).recipes
    terms = re.findall(r"([\d.]+) (bytes|kB|MB) \([^)]*\) / ([\d.]+) GB/s", one.decode.derivation)
    units = {"bytes": 1, "kB": 1e3, "MB": 1e6}
    assert len(terms) == 4  # two kinds of weights, vectors, keys and values
    seconds = sum(float(amount) * units[unit] / float(rate) / 1e9 for amount, unit, rate in terms)
    assert math.isclose(1 / seconds, one.decode.value, rel_tol=0.02)
    assert one.decode.basis == one.prefill.basis == one.run_memory.basis == "predicted"
    assert all(figure.value == 1024 for figure in one.contexts.values())


def test_a_format_says_the_runtime(model):
    plain = {"codec": "none"}
    recipe = parse_recipe(
        {"name": "mine", "weights": {"bits": 4, "group_size": 32}, "embedding": plain, "head": plain}, "test"
    )
    runtimes = {}
    for format in ("quern", "gguf", "compressed-tensors"):
        chosen = "q4_0" if format == "gguf" else recipe
        (one,) = quern.forecast(model, recipes=[chosen], format=format, on="gpu-24gb").recipes
        runtimes[one.runtime] = one.decode.value is not None
    assert runtimes == {"quern": False, "llama.cpp": True, "vllm": True}


def test_the_command_prints_the_same_as_a_table(model):
    shown = run("forecast", model, "--recipe", "rtn4", "--recipe", "fast", "--on", "desktop-16-core")
    assert shown.exit_code == 0, shown.stderr
    for word in (
        "artifact",
        "memory to quantize",
        "longest context, int4 cache",
        "predicted",
        "rtn4 (quern)",
        "fast (quern)",
    ):
        assert word in shown.stdout
    assert "measured " not in shown.stdout
    found = json.loads(run("forecast", model, "--recipe", "rtn4", "--on", "desktop-16-core", "--json").stdout)
    assert found["recipes"][0]["artifact_bytes"]["basis"] == "counted"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--on", "desktop"], "neither a file nor one of"),
        (["--recipe", "auto"], "recipe 'auto' has an allocation"),
        (["--recipe", "no-such"], "no-such"),
        (["--context", "99999", "--on", "gpu-24gb"], "--context is 99999; it must be from 1 to the 1024 tokens"),
        (["--format", "no-such", "--on", "gpu-24gb"], "no-such"),
    ],
)
def test_what_cannot_be_forecast_is_refused(model, words, said):
    shown = run("forecast", model, *words)
    assert shown.exit_code == 2
    assert said in shown.stderr
    assert shown.stdout == ""


def test_a_folder_without_anything_and_one_of_a_quantized_model_are_refused(tmp_path):
    with pytest.raises(UserError):
        quern.forecast(tmp_path, on="gpu-24gb")
    config = {**tiny_config(), "quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(UserError, match="that of a quantized model"):
        quern.forecast(tmp_path, on="gpu-24gb")
    with pytest.raises(UserError, match="names no recipe"):
        quern.forecast(tmp_path, recipes=[])


@pytest.fixture(scope="module")
def places(model):
    return quern.place(model, hardware=["desktop-16-core", "gpu-24gb"], scenario="storage")


def test_places_are_ranked_and_nothing_measured_is_among_their_speeds(places):
    scores = [one.score for one in places.ranking]
    assert scores == sorted(scores, reverse=True)
    assert places.choice == places.ranking[0]
    assert (
        {one.decode.basis for one in places.ranking} == {one.prefill.basis for one in places.ranking} == {"predicted"}
    )
    assert {(one.kind, one.runtime) for one in places.ranking} >= {
        ("cpu", "quern"), ("cpu", "llama.cpp"), ("cuda", "llama.cpp"), ("cuda", "vllm"),
    }  # fmt: skip
    assert Placements.model_validate_json(places.model_dump_json()) == places


def test_what_does_not_fit_says_by_how_much(tmp_path):
    config = tiny_config(
        "llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=8, num_attention_heads=64,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=8192,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    small = json.loads((resources.files("quern.hardware") / "gpu-24gb.json").read_text("utf-8"))
    small["memory"]["value"] = 6 * 10**9
    (tmp_path / "small.json").write_text(json.dumps(small), "utf-8")
    found = quern.place(tmp_path, hardware=[tmp_path / "small.json"], scenario="speed")
    assert found.excluded
    assert found.ranking
    for one in found.excluded:
        if one.memory_bytes > one.memory_limit:
            assert re.search(
                r"needs [\d.]+ GB, [\d.]+ (GB|MB) more than the 5.4 GB that a model may take there", one.reason
            )
    assert all(one.memory_bytes <= one.memory_limit == 5_400_000_000 for one in found.ranking)


def test_recommend_takes_results_or_a_model(model):
    shown = run("recommend", "--model", model, "--hardware", "gpu-24gb", "--scenario", "speed")
    assert shown.exit_code == 0, shown.stderr
    assert "Choice for speed" in shown.stdout
    assert "none was measured" in shown.stdout
    none = run("recommend", "--model", model, "--hardware", "gpu-24gb", "--min-speed", "1e9")
    assert none.exit_code == 1
    assert "Nothing fits." in none.stdout
    for words, said in (
        ([], "give RESULTS.json, which quern compare wrote, or --model MODEL"),
        (["some.json", "--hardware", "gpu-24gb"], "--hardware cannot be given with RESULTS.json"),
        (["--model", model, "--max-loss", "0.1"], "--max-loss cannot be given with --model"),
        (["--model", model, "--min-speed", "-1"], "min speed (tokens/s) must be a finite number above 0"),
    ):
        refused = run("recommend", *words)
        assert refused.exit_code == 2
        assert said in refused.stderr
