"""Who loads a compressed-tensors artifact: plain transformers, tried in a process that never heard of quern."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from artifacts import INT8, small_recipe
from tiny_model import tiny_config, write_model

from quern.core.errors import UserError
from quern.engines.base import ENGINES
from quern.formats.base import obstacles_of
from quern.formats.base import runtimes_of as readers_of
from quern.pipeline.quantize import quantize

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

GROUPS, CHANNELS = {"group_size": 32}, {"granularity": "channel"}
PLAIN = {
    **{f"W{bits}A16": {"weights": {"bits": bits, **GROUPS}} for bits in range(2, 9)},
    "W4A16 channel": {"weights": {"bits": 4, **CHANNELS}},
    "W8A16 channel": {"weights": {"bits": 8, **CHANNELS}},
    "W4A16 bfloat16 scales": {"weights": {"bits": 4, **GROUPS, "scale_dtype": "bfloat16"}},
    "W8A8 dynamic": {"weights": INT8, "activations": {"mode": "dynamic"}},
    "W8A8 static": {"weights": INT8, "activations": {"mode": "static"}},
    "W8A8 tensor": {"weights": {**INT8, "granularity": "tensor"}, "activations": {"mode": "dynamic"}},
    "FP8": {"weights": {"codec": "float8"}},
    "FP8 tensor": {"weights": {"codec": "float8", "granularity": "tensor"}},
    "FP8 block": {"weights": {"codec": "float8", "granularity": "block", "group_size": 16}},
    "mixed": {
        "weights": {"bits": 4, **GROUPS},
        "overrides": [{"pattern": "*.down_proj", "bits": 8, **CHANNELS}, {"pattern": "*.o_proj", "codec": "none"}],
        "head": {"bits": 8, **CHANNELS},
    },
}
NOT_PLAIN = {
    "W4A16 asymmetric": {"weights": {"bits": 4, "symmetric": False, **GROUPS}},
    "W8A16 asymmetric channel": {"weights": {"bits": 8, "symmetric": False, **CHANNELS}},
    "MXFP4": {"weights": {"codec": "mxfp4"}},
    "NVFP4": {"weights": {"codec": "nvfp4"}},
    "rotated": {"weights": {"bits": 4, **GROUPS}, "transforms": [{"method": "hadamard", "random_signs": False}]},
}
RECIPES = {**PLAIN, **NOT_PLAIN}
IDS = torch.randint(0, 296, (2, 21), generator=torch.Generator().manual_seed(3))
LOAD = """
import sys, json, torch, transformers
from pathlib import Path
transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
ids, found = torch.load("ids.pt"), {}
for folder in sorted(path.parent for path in Path().glob("*/config.json")):
    dequantize = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    for way, options in {"plain": {}, "dequantized": dequantize}.items():
        if found.get(str(folder), {}).get("plain") == "equal":
            break
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
            with torch.no_grad():
                same = bool((model(ids, use_cache=False).logits - torch.load(f"{folder}.pt")).abs().max() <= 1e-5)
            found.setdefault(str(folder), {})[way] = "equal" if same else "differs"
        except Exception as error:
            found.setdefault(str(folder), {})[way] = type(error).__name__
assert "quern" not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_text):
    """By recipe: its report, and what transformers made of the artifact."""
    folder = tmp_path_factory.mktemp("exported")
    (models := folder / "models").mkdir()
    config = tiny_config("qwen2", num_hidden_layers=1, tie_word_embeddings=False)
    model, reports = write_model(models / "model", config), {}
    for name, choices in RECIPES.items():
        recipe = small_recipe(format="compressed-tensors", **choices)
        reports[name] = quantize(model, folder / name, recipe=recipe, calibration=[tiny_text], threads=1)
        torch.save(ENGINES.get("reference")().load(folder / name, dtype="float32").logits(IDS), folder / f"{name}.pt")
    torch.save(IDS, folder / "ids.pt")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", LOAD],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return reports, json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", PLAIN)
def test_plain_transformers_computes_the_same(name, exported):
    """The reference engine's logits; a rounding of activations may flip, hence no more than 1e-5 of values around 1."""
    reports, found = exported
    assert found[name]["plain"] == "equal"
    assert "transformers" in readers_of(reports[name].recipe)
    assert not any("transformers" in note for note in reports[name].notes)


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_plain_transformers_cannot_is_said(name, exported):
    reports, found = exported
    assert found[name]["plain"] != "equal"
    assert "transformers" not in readers_of(reports[name].recipe)
    (note,) = [note for note in reports[name].notes if "transformers" in note]
    assert ("dequantize=True" in note) == (found[name]["dequantized"] == "equal")


def test_asymmetric_weights_of_several_schemes_are_neither_written_nor_run(tiny_model, tmp_path):
    """Transformers would decompress all of them by one scheme: an error, or wrong weights."""
    asymmetric = {"bits": 4, "symmetric": False, **GROUPS}
    for other in ({"bits": 4, **GROUPS}, {"bits": 8, "symmetric": False, **GROUPS}):
        recipe = small_recipe(
            format="compressed-tensors", weights=asymmetric, overrides=[{"pattern": "*.down_proj", **other}]
        )
        with pytest.raises(UserError, match="asymmetric weights need one scheme for all"):
            quantize(tiny_model, tmp_path / "out", recipe=recipe)
    recipe = small_recipe(format="compressed-tensors", weights=asymmetric)
    folder = quantize(tiny_model, tmp_path / "out", recipe=recipe, threads=1).path
    config = json.loads((folder / "config.json").read_text("utf-8"))
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = {**groups["group_0"], "targets": [groups["group_0"]["targets"].pop()]}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(UserError, match="asymmetric weights beside weights of another scheme"):
        ENGINES.get("reference")().load(folder)


def test_every_reason_is_told_at_once(tiny_model, tmp_path):
    with pytest.raises(UserError, match="cannot store recipe 'compact'") as caught:
        quantize(tiny_model, tmp_path / "out", recipe="compact", format="compressed-tensors")
    for reason in ("not codec 'trellis'", "no random signs", "no quantized embedding"):
        assert reason in str(caught.value)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(set(lines)), "each reason once, with an example of its modules"
    assert list(tmp_path.iterdir()) == []


def test_vllm_is_told_about_rotations_in_front_of_biases(exported, tiny_text, tmp_path):
    """Qwen2 has biases in q, k and v; Llama has none."""
    (note,) = [note for note in exported[0]["rotated"].notes if note.startswith("vllm refuses")]
    assert "k_proj, q_proj, v_proj of this model have one" in note
    model = write_model(tmp_path / "llama", tiny_config("llama", num_hidden_layers=1, attention_bias=False))
    report = quantize(
        model, tmp_path / "out", recipe=small_recipe(format="compressed-tensors", **NOT_PLAIN["rotated"]), threads=1
    )
    assert not any("refuses" in note for note in report.notes)
    assert any("vllm rotates inputs on one GPU only" in note for note in report.notes)


@pytest.mark.parametrize(("bits", "loads"), [(2, False), (3, False), (4, True), (5, False), (8, True)])
def test_bits_that_vllm_packs(bits, loads):
    for place in ("weights", "head"):
        choices = {"weights": {"bits": 4, **GROUPS}, place: {"bits": bits, **GROUPS}}
        recipe = small_recipe(format="compressed-tensors", **choices)
        assert ("vllm" in readers_of(recipe)) == loads
        assert [obstacle.reason.endswith(f"not of {bits}") for obstacle in obstacles_of(recipe)] == [True] * (not loads)


def test_the_own_format_has_its_plug_in():
    assert readers_of(small_recipe()) == ("quern", "transformers")


def test_the_page_says_the_same():
    page = (Path(__file__).resolve().parents[2] / "docs" / "compressed-tensors.md").read_text("utf-8")
    assert "dequantize=True" in page
    assert "4 and 8 bits" in page
