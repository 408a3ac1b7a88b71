"""``quern recommend`` hands every limit on, and refuses what is none with exit code 2."""

import json

import pytest
from sample_results import sample_tool_results
from typer.testing import CliRunner

from quern.advisor.recommend import recommend
from quern.cli.main import app


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    file = tmp_path_factory.mktemp("results") / "results.json"
    file.write_text(sample_tool_results().model_dump_json(), "utf-8")
    return str(file)


def asked(results, *options, code=0):
    ended = CliRunner().invoke(app, ["recommend", results, *options, "--json"])
    assert ended.exit_code == code, ended.output
    return json.loads(ended.stdout)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (["--max-memory", "428MB"], {"max_memory": 428_000_000}),
        (["--max-size", "5MB"], {"max_size": 5_000_000}),
        (["--min-agreement", "0.97"], {"min_agreement": 0.97}),
        (["--for", "llama.cpp"], {"target": "llama.cpp"}),
        (["--licence", "MIT, BSD-3-Clause"], {"licences": ("MIT", "BSD-3-Clause")}),
        (["--max-loss", "0.01", "--min-speed", "300"], {"max_loss": 0.01, "min_speed": 300.0}),
    ],
)
def test_limits_arrive(results, options, arguments):
    expected = recommend(sample_tool_results(), "overall", **arguments)
    found = asked(results, "--scenario", "overall", *options)
    assert {**found, "warnings": []} == expected.model_dump(mode="json")


def test_the_length_of_a_text_arrives(results):
    """No row of the sample says what its cache takes, so none is known to keep within the memory."""
    found = asked(results, "--max-memory", "428MB", "--context", "4096", code=1)
    assert "peak memory with 4096 tokens of context at most 428 MB" in found["reasons"][0]
    assert any("its key/value cache was not measured" in entry["reason"] for entry in found["excluded"])


def test_the_machine_is_named_and_another_one_warned_of(results, monkeypatch):
    sample = {"cpu_model": "AMD EPYC 9R14", "usable_cores": 2, "kernels_in_use": "avx2"}
    monkeypatch.setattr("quern.advisor.hardware.this_processor", lambda: sample)
    found = asked(results, "--scenario", "speed")
    assert found["measured_on"] == {
        "processor": "AMD EPYC 9R14",
        "cores": 2,
        "kernels": None,
        "created": "2026-01-15T10:30:00+00:00",
    }
    assert found["warnings"] == []
    monkeypatch.setattr("quern.advisor.hardware.this_processor", lambda: {**sample, "usable_cores": 8})
    (warning,) = asked(results, "--scenario", "speed")["warnings"]
    assert "another machine (usable cores 2 there, 8 here)" in warning
    text = CliRunner().invoke(app, ["recommend", results, "--scenario", "speed"]).stdout
    assert "Measured on AMD EPYC 9R14, 2 cores, 2026-01-15." in text
    assert "warning: The figures come from another machine" in text


def test_weights_arrive(results):
    found = asked(results, "--scenario", "mix", "--weights", "size=1,speed=2,loss=1")
    assert found["weights"] == {"size": 0.25, "speed": 0.5, "loss": 0.25}


def test_nothing_fits(results):
    assert asked(results, "--scenario", "speed", "--for", "openvino", "--licence", "MIT", code=1)["choice"] is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--scenario", "mix"], "needs weights"),
        (["--scenario", "speed", "--weights", "size=1"], "brings its own weights"),
        (["--scenario", "mix", "--weights", "size"], "--weights"),
        (["--scenario", "speed", "--for", "excel"], "llama.cpp"),
        (["--scenario", "speed", "--min-agreement", "97"], "--min-agreement"),
        (["--scenario", "speed", "--max-memory", "much"], "--max-memory"),
        (["--scenario", "speed", "--licence", ","], "SPDX"),
    ],
)
def test_what_is_no_limit_is_refused(results, options, said):
    ended = CliRunner().invoke(app, ["recommend", results, *options], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert ended.exit_code == 2
    assert said in ended.stderr


def test_the_scenario_is_the_one_of_a_comparison_and_has_its_former_name(results):
    usual = asked(results)
    assert usual["scenario"] == "overall"
    assert asked(results, "--scenario", "balanced") == usual
    ended = CliRunner().invoke(app, ["recommend", results, "--scenario", "taste"])
    assert ended.exit_code == 2
    assert "storage, speed, overall, mix" in " ".join(ended.stderr.replace("│", " ").split())
