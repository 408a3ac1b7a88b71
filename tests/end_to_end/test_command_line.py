"""Every verb once, on a tiny model, as a process would run it: JSON alone on stdout, words without --json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sample_results import sample_results
from tiny_model import tiny_config, write_model
from typer.testing import CliRunner

from quern.cli.main import app
from quern.core.results import Results, Row

pytestmark = pytest.mark.usefixtures("quiet_machine")
RECIPE = """
name: quick
weights: {bits: 4, group_size: 16}
embedding: {bits: 8, granularity: channel}
rounding: {method: nearest}
calibration: {token_weight: none}
"""
PROFILES = {
    "auto",
    "auto-gguf",
    "balanced",
    "compact",
    "fast",
    "float8",
    "iq2_s",
    "iq2_xs",
    "iq2_xxs",
    "iq3_s",
    "iq2_m",
    "iq3_m",
    "iq3_xs",
    "iq3_xxs",
    "iq4_nl",
    "iq4_xs",
    "kmeans3",
    "kmeans4",
    "log4",
    "mxfp4",
    "nf4",
    "nvfp4",
    "rtn4",
    "ternary",
    "q2_k",
    "q2_k_s",
    "q3_k",
    "q3_k_l",
    "q3_k_m",
    "q3_k_s",
    "q4_0",
    "q4_k",
    "q4_k_m",
    "q4_k_s",
    "q5_k",
    "q5_k_m",
    "q5_k_s",
    "q6_k",
    "q8_0",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, a recipe, texts and choices; ``model-quick`` is the model quantized."""
    folder = tmp_path_factory.mktemp("command_line")
    write_model(folder / "model", tiny_config(max_position_embeddings=256))
    (folder / "quick.yaml").write_text(RECIPE)
    (folder / "text.txt").write_text("The miller grinds the grain. " * 100)
    pairs = [{"sentence_good": f"a {i} b", "sentence_bad": f"b {i} a"} for i in range(6)]
    (folder / "choice.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "results.json").write_text(sample_results().model_dump_json())
    told = run(folder, "quantize", "model", "-o", "model-quick", "--recipe", "quick.yaml", "--threads", "1")
    assert "model-quick" in told
    return folder


def run(folder: Path, *arguments: str, code: int = 0) -> str:
    before = set(folder.rglob("*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ended = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"}, catch_exceptions=False)
    assert ended.exit_code == code, ended.stderr
    if "-o" not in arguments:
        assert set(folder.rglob("*")) == before, "written without being asked to"
    return ended.stdout


def run_json(folder: Path, *arguments: str, code: int = 0):
    return json.loads(run(folder, *arguments, "--json", code=code))


def test_quantize_again_finds_it_done(folder):
    found = run_json(folder, "quantize", "model", "-o", "model-quick", "--recipe", "quick.yaml", "--threads", "1")
    assert found["path"] == "model-quick"
    assert found["resumed"] is True
    assert found["bytes"] == sum(path.stat().st_size for path in (folder / "model-quick").iterdir())


def test_quantize_into_the_result_of_another_job_is_refused(folder):
    run(folder, "quantize", "model", "-o", "model-quick", "--recipe", "quick.yaml", "--seed", "1", code=2)


def test_evaluate(folder):
    options = ("--reference", "model", "--text", "text.txt", "--choice", "choice.jsonl", "--tokens", "300")
    row = Row.model_validate(run_json(folder, "evaluate", "model-quick", *options, "--threads", "1"))
    assert row.kl_mean > 0
    assert row.choice_accuracy is not None
    assert row.bytes == sum(path.stat().st_size for path in (folder / "model-quick").iterdir())


def test_inspect(folder):
    found = run_json(folder, "inspect", "model-quick")
    assert found["recipe"] == "quick"
    assert {row["granularity"] for row in found["tensors"]} == {"group 16", "channel", "-"}
    assert "group 16" in run(folder, "inspect", "model-quick")


def test_generate(folder):
    found = run_json(folder, "generate", "model-quick", "--prompt", "grain", "--max-tokens", "8")
    assert found["prompt"] == "grain"
    assert run(folder, "generate", "model-quick", "--prompt", "grain", "--max-tokens", "8") == found["text"] + "\n"


def test_report(folder):
    found = run_json(folder, "report", "results.json", "-o", "report.html")
    assert found == {"report": str(folder / "report.html")}
    assert "<html" in (folder / "report.html").read_text("utf-8")


def test_recommend(folder):
    found = run_json(folder, "recommend", "results.json", "--scenario", "storage")
    assert found["scenario"] == "storage"
    assert found["choice"] in run(folder, "recommend", "results.json", "--scenario", "storage")


def test_recommend_what_nothing_meets(folder):
    found = run_json(folder, "recommend", "results.json", "--scenario", "speed", "--max-size", "1KiB", code=1)
    assert found["choice"] is None
    assert found["reasons"]


def test_probe(folder):
    found = run_json(folder, "probe")
    assert found["cpu_model"]
    assert found["measured"]["read_bandwidth_gb_s"]["1"] > 0


def test_recipes(folder):
    found = run_json(folder, "recipes")
    assert set(found["recipes"]) == PROFILES
    assert "integer" in found["choices"]["codec"]
    assert "integer" in run(folder, "recipes")


@pytest.mark.usefixtures("warm_workers")  # test_evaluate started them as users do
def test_compare(folder):
    options = ("--text", "text.txt", "--choice", "choice.jsonl", "--tokens", "300", "--threads", "1")
    found = run_json(folder, "compare", "model", "--recipes", "quick.yaml", "-o", "comparison", *options)
    results = Results.model_validate(found)
    assert [(row.name, row.engine) for row in results.rows] == [
        ("unquantized", "reference"), ("unquantized (cpu)", "cpu"), ("quick", "cpu"),
    ]  # fmt: skip
    assert Results.model_validate_json((folder / "comparison" / "results.json").read_text("utf-8")) == results
    assert (folder / "comparison" / "report.html").is_file()
