"""Which numbers of GPUs vLLM can cut a model for: by its shapes, groups and kernels."""

import re
from pathlib import Path

import pytest
from artifacts import small_recipe
from repository_tools import load_tool
from tiny_model import calibration_text, tiny_config, write_model
from typer.testing import CliRunner

import quern
from quern.architectures.base import architecture_of
from quern.cli.main import app
from quern.pipeline.blockwise.job import plan_of
from quern.pipeline.quantize import quantize
from quern.pipeline.stacking.tensor_parallel import SIZES, parallel_sizes, told

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "vllm.md").read_text("utf-8")
SCHEMES = {
    "4 bits, groups of 128": {"weights": {"group_size": 128}},
    "4 bits, groups of 64": {"weights": {"group_size": 64}},
    "4 bits, groups of 32": {"weights": {"group_size": 32}},
    "4 bits by channel": {"weights": {"granularity": "channel"}},
    "W8A8 by channel": {"weights": {"bits": 8, "granularity": "channel"}, "activations": {"mode": "dynamic"}},
}


def architecture(name="qwen2.5-72b", **changes):
    return architecture_of({**load_tool("make_synthetic_checkpoint").KNOWN[name], "num_hidden_layers": 1, **changes})


def sizes(model, sizes=SIZES, format="compressed-tensors", **choices):
    recipe = small_recipe(format=format, **choices)
    return {one.size: one for one in parallel_sizes(plan_of(recipe, model), model, format, sizes)}


def test_groups_of_128_of_qwen_72b_are_not_cut_and_padding_mends_it():
    found = sizes(architecture(), **SCHEMES["4 bits, groups of 128"])
    assert found[1].problems == ()
    assert found[8].problems == ("down_proj has 29568 inputs, of which a GPU gets 3696 = 28.875 groups of 128",)
    assert [one.padding for one in found.values()] == [None, 256, 512, 1024, 2048]
    for size, one in found.items():
        whole = -(-29568 // one.padding) * one.padding if one.padding else 29568
        mended = sizes(architecture(intermediate_size=whole), **SCHEMES["4 bits, groups of 128"])[size]
        assert (mended.problems, mended.tiles, told(mended)) == ((), (), "works")


def test_without_groups_only_tiles_are_broken():
    found = sizes(architecture(), **SCHEMES["4 bits by channel"])
    assert not any(one.problems for one in found.values())
    assert found[8].tiles == (
        "gate_proj has 7392 outputs on a GPU, and tiles have 64",
        "up_proj has 7392 outputs on a GPU, and tiles have 64",
        "down_proj has 3696 inputs on a GPU, and tiles have 128",
    )
    assert found[8].padding == 1024
    assert not any(one.tiles for one in sizes(architecture(), **SCHEMES["W8A8 by channel"]).values() if one.size < 16)


def test_heads_that_do_not_divide_are_refused_and_nothing_mends_that():
    found = sizes(architecture("qwen2.5-1.5b"), (1, 2, 4, 5, 8), **SCHEMES["4 bits, groups of 128"])
    assert found[8].problems[0] == "12 attention heads are no multiple of 8"
    assert found[5].problems[0] == "12 attention heads are no multiple of 5"
    assert found[5].problems[1] == "2 key/value heads are neither a multiple of 5 nor a divisor"
    assert found[8].padding is found[5].padding is None
    assert not [problem for problem in found[4].problems if "heads" in problem], "2 heads are repeated for 4 GPUs"


def test_attention_outputs_are_cut_between_groups_too():
    model = architecture(hidden_size=1024, num_attention_heads=16, head_dim=64, intermediate_size=8192)
    found = sizes(model, (8, 16), **SCHEMES["4 bits, groups of 128"])
    assert found[8].problems == ()
    assert found[16].problems == ("o_proj has 1024 inputs, of which a GPU gets 64 = 0.5 groups of 128",)
    assert found[16].padding is None


def test_awq_packs_whole_words_of_outputs():
    model = architecture(hidden_size=256, intermediate_size=12 * 32, num_attention_heads=32, head_dim=32)
    (refused,) = sizes(model, (32,), format="awq", weights={"granularity": "channel"}).values()
    assert refused.problems[-1] == "up_proj has 384 outputs, of which a GPU gets 12, and AWQ packs 8 into a word"


def test_what_is_not_quantized_only_has_to_divide():
    found = sizes(architecture(), (8, 9), weights={"codec": "none"})
    assert told(found[8]) == "works"
    assert found[9].problems[-1] == "down_proj has 29568 inputs, no multiple of 9"


def test_the_page_has_what_is_found():
    rows = re.findall(r"^\| (4 bits.*|W8A8.*) \|$", PAGE, flags=re.MULTILINE)
    shown = {cells[0]: cells[1:] for cells in (row.split(" | ") for row in rows)}
    assert shown.keys() == SCHEMES.keys()
    for name, choices in SCHEMES.items():
        found = sizes(architecture(), **choices)
        words = ["no" if one.problems else "tiles" if one.tiles else "yes" for one in found.values()]
        padded = [None if one.padding is None else f"{one.padding}" for one in found.values()]
        assert shown[name] == [f"{word}, {pad}" if pad else word for word, pad in zip(words, padded, strict=True)], name


def test_a_recipe_and_an_artifact_are_checked_by_the_command(tmp_path):
    config = tiny_config(hidden_size=128, head_dim=32, intermediate_size=192, num_hidden_layers=1)
    model = write_model(tmp_path / "model", config)
    recipe = small_recipe(format="compressed-tensors", weights={"group_size": 64})
    report = quern.check(recipe, runtime="vllm", model=model, tensor_parallel=2)
    assert report.label == "refuses"
    assert report.problems == [
        "on 2 GPUs: down_proj has 192 inputs, of which a GPU gets 96 = 1.5 groups of 64; padding: {intermediate: 256} in the "
        "recipe mends it"
    ]
    (tmp_path / "text.txt").write_text(calibration_text()[:9000], "utf-8")
    mended = type(recipe).model_validate({**recipe.to_json(), "padding": {"intermediate": 256}})
    artifact = quantize(model, tmp_path / "out", recipe=mended, calibration=[tmp_path / "text.txt"], threads=1).path
    shown = CliRunner().invoke(app, ["check", str(artifact), "--for", "vllm", "--tensor-parallel", "2"])
    assert shown.exit_code == 0
    assert "tensor parallel 2: works" in shown.stdout
    assert "tensor parallel 16: refused: 4 attention heads are no multiple of 16" in shown.stdout.replace("\n", " ")


def test_a_folder_called_like_a_shipped_recipe_does_not_hide_it(tmp_path, monkeypatch):
    (tmp_path / "balanced").mkdir()
    monkeypatch.chdir(tmp_path)
    assert quern.check("balanced").label == "works"


@pytest.mark.parametrize(("arguments", "said"), [
    (["check", "balanced", "--tensor-parallel", "2"], "Add --for vllm"),
    (["check", "balanced", "--for", "vllm", "--tensor-parallel", "0"], "from 1 to 1024"),
    (["check", "balanced", "--for", "vllm", "--tensor-parallel", "2"], "Add --model"),
    (["check", "--matrix", "--tensor-parallel", "2"], "--tensor-parallel are for RECIPE alone"),
    (["check", "tests", "--for", "vllm"], "is no artifact"),
])  # fmt: skip
def test_what_cannot_be_asked(arguments, said):
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 2
    assert said in ended.stderr
