"""A family, a codec and a format are one file each: dropped into a copy of the package, they reach every command."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import other_copy
import pytest
from tiny_model import calibration_text, tiny_config, write_model

from quern.pipeline.output import artifact_names

HERE, ROOT = Path(__file__).parent, Path(__file__).resolve().parents[2]
DROPPED = {"family": "architectures/qwen2_moe.py", "codec": "codecs/vector.py", "form": "formats/zipped.py"}
RECIPE = """
name: dropped
weights: {codec: vector, entries: 64, steps: 4}
overrides:
  - {pattern: "*.down_proj", codec: integer, bits: 4, group_size: 16}
  - {pattern: "*.o_proj", rounding: {method: nearest}, rotated: false}
transforms: [{method: hadamard}]
calibration: {tokens: 512, sequence_length: 64}
format: zipped
"""


def config() -> dict:
    """One dense block, and one with four routed experts and a shared one."""
    return tiny_config(
        "qwen2_moe",
        num_hidden_layers=2,
        decoder_sparse_step=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
        layer_types=["full_attention"] * 2,
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dropped")
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name, place in DROPPED.items():
        shutil.copy(HERE / f"{name}.py", folder / "src" / "quern" / place)
    other_copy.prefer(folder / "src")
    write_model(folder / "model", config())
    (folder / "text.txt").write_text(calibration_text()[:40_000], "utf-8")
    (folder / "dropped.yaml").write_text(RECIPE, "utf-8")
    quern(
        folder,
        "quantize",
        "model",
        "--recipe",
        "dropped.yaml",
        "--calibration",
        "text.txt",
        "-o",
        "out",
        "--threads",
        "1",
    )
    return folder


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "COLUMNS": "200"}
    ended = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def quern(folder: Path, *arguments: str) -> str:
    return run(folder, "-c", "from quern.cli.main import run; run()", *arguments)


def test_the_artifact_is_one_archive_and_says_everything_of_each_module(copy):
    assert {path.name for path in (copy / "out").iterdir()} >= {"model.zip", "config.json", "quern.json"}
    assert not list((copy / "out").glob("*.safetensors"))
    assert "model.zip" in artifact_names(copy / "out"), "what --fresh may replace"
    modules = json.loads((copy / "out/config.json").read_text())["quantization_config"]["modules"]
    assert len(modules) == (4 + 3) + (4 + 3 + 4 * 3)
    gate = modules["model.layers.1.mlp.experts.3.gate_proj"]
    assert gate == {"weights": {"codec": "vector", "entries": 64, "steps": 4}, "rotated": True, "activations": "none"}
    assert modules["model.layers.0.mlp.down_proj"]["weights"]["codec"] == "integer"
    assert modules["model.layers.1.self_attn.o_proj"]["rotated"] is False


def test_inspect_shows_the_codec(copy):
    rows = json.loads(quern(copy, "inspect", "out", "--json"))["tensors"]
    (row,) = [row for row in rows if row["name"] == "model.layers.1.mlp.experts.0.up_proj.weight"]
    assert (row["codec"], row["bits"], row["shape"]) == ("vector", 2.0, [32, 64])
    assert row["bytes"] == 32 * 16 + 2 * 32 + 2 * 64 * 4


def test_evaluate_and_compare_run_it(copy):
    shown = json.loads(
        quern(
            copy,
            "evaluate",
            "out",
            "--reference",
            "model",
            "--tokens",
            "256",
            "--no-speed",
            "--text",
            "text.txt",
            "--json",
        )
    )
    row = next(row for row in shown["rows"] if row["name"] == "out") if "rows" in shown else shown
    assert 0 < row["kl_mean"] < 5
    quern(
        copy, "compare", "model", "--recipes", "dropped.yaml", "--calibration", "text.txt", "--text", "text.txt",
        "--tokens", "256", "--no-speed", "-o", "compared",
    )  # fmt: skip
    results = json.loads((copy / "compared/results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["unquantized", "dropped"]
    compared = results["rows"][1]
    assert compared["kl_mean"] == pytest.approx(row["kl_mean"], rel=1e-6), "the same bytes as by quantize"
    assert len(compared["layers"]) == 26
    assert "dropped" in (copy / "compared/report.html").read_text("utf-8")


CHECK = """
import json, sys
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


def test_experts_as_linears_compute_what_the_stack_does(copy):
    """The same products in another order: float32 rounding through two blocks."""
    assert float(run(copy, "-c", CHECK).split()[-1]) < 1e-5


def test_nothing_else_was_touched(copy):
    ours = {path.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("*.py")}
    theirs = {path.relative_to(copy / "src") for path in (copy / "src").rglob("*.py")} - {Path("sitecustomize.py")}
    assert theirs - ours == {Path("quern", place) for place in DROPPED.values()}
    assert all((copy / "src" / path).read_bytes() == (ROOT / "src" / path).read_bytes() for path in ours)
