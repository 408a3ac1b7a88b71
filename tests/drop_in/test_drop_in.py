"""A family, a codec, a format and a measure are one file each: in a copy of the package they reach every command."""

import json
import re
import shutil

import numpy as np
import pytest
from drop_in.conftest import ROOT
from tiny_model import tiny_config

from quern.core.results import load_results
from quern.pipeline.output import artifact_names


def test_the_artifact_is_one_archive_and_says_everything_of_each_module(copy, shown):
    assert {path.name for path in (copy / "out").iterdir()} >= {"model.zip", "config.json", "quern.json"}
    assert not list((copy / "out").glob("*.safetensors"))
    assert "model.zip" in artifact_names(copy / "out"), "what --fresh may replace"
    modules = json.loads((copy / "out/config.json").read_text())["quantization_config"]["modules"]
    assert len(modules) == (4 + 3) + (4 + 3 + 4 * 3)
    gate = modules["model.layers.1.mlp.experts.3.gate_proj"]
    assert gate == {"weights": {"codec": "vector", "entries": 64, "steps": 4}, "rotated": True, "activations": "none"}
    assert modules["model.layers.0.mlp.down_proj"]["weights"]["codec"] == "integer"
    assert modules["model.layers.1.self_attn.o_proj"]["rotated"] is False


def test_inspect_shows_the_codec(shown):
    (row,) = [
        row
        for row in json.loads(shown["inspect"])["tensors"]
        if row["name"] == "model.layers.1.mlp.experts.0.up_proj.weight"
    ]
    assert (row["codec"], row["bits"], row["shape"]) == ("vector", 2.0, [32, 64])
    assert row["bytes"] == 32 * 16 + 2 * 32 + 2 * 64 * 4


def test_evaluate_and_compare_run_it(copy, shown, rows):
    assert [row["name"] for row in rows] == ["unquantized", "dropped"]
    assert 0 < rows[1]["kl_mean"] < 5
    assert f"{rows[1]['kl_mean']:.3g}"[:4] in shown["evaluate"], "the same bytes as by quantize"
    assert len(rows[1]["layers"]) == 26
    assert "dropped" in (copy / "compared/report.html").read_text("utf-8")


CHECK = """
import json
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from safetensors.torch import load_file
from quern.engines.base import ENGINES

config = json.load(open("model/config.json"))
values = {key: value for key, value in config.items() if key not in ("model_type", "torch_dtype")}
theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **values)).eval()
state = {name: tensor.float() for name, tensor in load_file("model/model.safetensors").items()}
theirs.load_state_dict(state, strict=False)
ids = torch.randint(0, 256, (2, 19), generator=torch.Generator().manual_seed(0))
ours = ENGINES.get("reference")().load("model", dtype="float32").logits(ids)
with torch.no_grad():
    expected = theirs(ids, use_cache=False).logits
print(float((ours - expected).abs().max() / expected.abs().max()))
"""


def test_experts_as_linears_compute_what_the_stack_does(run):
    """The same products in another order: float32 rounding through two blocks."""
    assert float(run("-c", CHECK).split()[-1]) == pytest.approx(0, abs=1e-5)


# A measure


def written(row: dict) -> str:
    return f"{row['figures']['entropy']['value']:.3g}"


def test_evaluate_shows_it(shown, rows):
    (line,) = [line for line in shown["evaluate"].splitlines() if "Entropy" in line]
    assert line.split()[-1] == written(rows[1])


def test_compare_writes_it_for_every_row(copy, shown, rows):
    assert [set(row["figures"]) for row in rows] == [{"entropy"}] * len(rows)
    for row in rows:
        figure = row["figures"]["entropy"]
        low, high = figure["interval"]
        assert low < figure["value"] < high < np.log(tiny_config()["vocab_size"])
        assert figure["unit"] == "nats/token"
    values = {row["kind"]: row["figures"]["entropy"]["value"] for row in rows}
    assert values["quern"] != values["unquantized"]
    without_the_measure = load_results(copy / "compared" / "results.json")
    assert [row.figures["entropy"].value for row in without_the_measure.rows] == [
        row["figures"]["entropy"]["value"] for row in rows
    ]


def test_compare_shows_it(shown, rows):
    table = shown["compare"].split("Places.")[0]
    assert "Entropy," in table
    for row in rows:
        assert any(row["name"] in line and written(row) in line for line in table.splitlines())


def test_the_report_has_a_column_of_it(copy, shown):
    page = (copy / "compared" / "report.html").read_text("utf-8")
    assert '<th scope="col" data-key="entropy" data-better="low">' in page
    assert "Mean entropy of the predictions" in page
    data = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)[1])
    column = {"key": "entropy", "label": "Entropy", "unit": "nats/token", "better": "low", "kind": "number"}
    assert {**column, "title": "Entropy"} in data["columns"]
    assert all(
        row["ranges"]["entropy"][0] < row["values"]["entropy"] < row["ranges"]["entropy"][1] for row in data["rows"]
    )


def test_the_page_of_results_gets_its_line(copy, run):
    for name in ("tools/update_results_page.py", "docs/results.md"):
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    run("tools/update_results_page.py")
    old, new = ((folder / "docs/results.md").read_text("utf-8").splitlines() for folder in (ROOT, copy))
    (line,) = [line for line in new if line not in old]
    assert line == (
        "| `entropy` | nats/token | low | `figures.entropy` | Mean entropy of the predictions, with its 95 % interval. |"
    )
    assert len(new) == len(old) + 1


UNIFORM = """
import numpy, torch
from pathlib import Path
from fake_model import VOCABULARY, FakeModel
from quern.evaluation.measures.base import MEASURES, Given
from quern.evaluation.texts import Window, Windows, save_windows

windows = tuple(Window(number // 2, numpy.arange(2, 6 + number)) for number in range(4))
save_windows(Path("w.npz"), Windows(windows, ()))
steps = []
measure = MEASURES.get("entropy")
raw = measure.run(FakeModel(torch.zeros(VOCABULARY, VOCABULARY)), Given(advance=steps.append, windows_file="w.npz"))
print(VOCABULARY, sum(steps), [row[:2] for row in raw], measure.summarize(raw, 0).value)
"""


def test_a_uniform_model_has_the_entropy_of_its_vocabulary(run):
    told = run("-c", UNIFORM)
    vocabulary, steps, value = re.fullmatch(r"(\d+) (\d+) \[.*\] (\S+)\n", told).groups()
    assert "[(0, 3), (0, 4), (1, 5), (1, 6)]" in told
    assert steps == "22"
    assert float(value) == pytest.approx(np.log(int(vocabulary)), rel=1e-12)
