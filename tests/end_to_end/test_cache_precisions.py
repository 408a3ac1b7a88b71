"""The precision of the key/value cache through the commands: what it costs as rows, what it takes, what is refused."""

import json
import re

import pytest
import torch
from artifacts import INT8, small_recipe
from repository_tools import load_tool
from tiny_model import calibration_text, tiny_config, write_model
from typer.testing import CliRunner

from quern.cli.main import app
from quern.core.errors import UserError
from quern.engines.cpu import CACHES, CpuEngine
from quern.engines.reference import load as load_reference
from quern.evaluation.texts import Text
from quern.generation.generate import generate
from quern.pipeline.compare import compare
from quern.pipeline.evaluate import evaluate
from quern.pipeline.inspect import inspect

pytestmark = pytest.mark.usefixtures("quiet_machine", "warm_workers")
TEXTS = [Text.of("text", [calibration_text()[:600], calibration_text()[600:1200]])]
SHORT = {"tokens": 200, "window": 64, "threads": 1, "speed_rounds": 0}
LAYERS, HEADS, HEAD_DIM = 3, 2, 16
BYTES = {
    precision: LAYERS * HEADS * 2 * each
    for precision, each in (("float32", 64), ("float16", 32), ("int8", 16 + 4), ("int4", 8 + 2))
}
"""Codes and scales of keys and values of one token: int8 a float32 scale for each head, int4 a float16 one."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = tiny_config("qwen2", torch_dtype="float32", initializer_range=0.1)
    assert (config["num_hidden_layers"], config["num_key_value_heads"]) == (LAYERS, HEADS)
    return write_model(tmp_path_factory.mktemp("cache") / "model", config)


def test_one_command_measures_what_a_cache_costs(model):
    rows = {cache: evaluate(model, texts=TEXTS, cache=cache, **SHORT) for cache in (None, "int8", "int4")}
    for cache, row in rows.items():
        assert row.cache == (cache or "float16")
        assert row.figures["cache"].value == BYTES[row.cache]
        assert row.kl_noise_floor == rows[None].kl_noise_floor
    assert rows[None].kl_mean < rows["int8"].kl_mean < rows["int4"].kl_mean < 0.1


def test_a_comparison_has_a_row_with_each_cache(model, tmp_path):
    recipe = small_recipe(name="quick", weights=INT8, embedding=INT8, rounding={"method": "nearest"})
    results = compare(
        model, tmp_path / "out", caches=["float16", "int4", "int4"], recipes=[recipe], texts=TEXTS, **SHORT
    )
    assert [(row.name, row.engine, row.cache) for row in results.rows] == [
        ("unquantized", "reference", None), ("unquantized (cpu)", "cpu", "float16"),
        ("quick", "cpu", "float16"), ("quick (int4 cache)", "cpu", "int4"),
    ]  # fmt: skip
    plain, narrow = results.rows[2:]
    assert (plain.artifact_sha256, plain.bytes) == (narrow.artifact_sha256, narrow.bytes)
    assert plain.kl_mean < narrow.kl_mean


def test_rows_of_the_reference_engine_are_measured_once(model, tmp_path):
    recipe = small_recipe(name="quick", weights=INT8, embedding=INT8, rounding={"method": "nearest"})
    results = compare(
        model, tmp_path / "out", recipes=[recipe], texts=TEXTS, caches=["int8", "int4"], engine="reference", **SHORT
    )
    assert [(row.name, row.cache) for row in results.rows] == [("unquantized", None), ("quick", None)]
    assert any("keeps keys and values in its own way" in note for note in results.rows[1].notes)


@pytest.mark.parametrize("run", [
    lambda model, **given: evaluate(model, texts=TEXTS, **given, **SHORT),
    lambda model, **given: generate(model, "grain", **given),
])  # fmt: skip
def test_what_there_is_not_is_refused(model, run):
    with pytest.raises(UserError, match=r"cache='int5'.* is not known; give one of float32, float16, int8, int4"):
        run(model, cache="int5")
    with pytest.raises(UserError, match="is for the cpu engine; this model runs on the reference engine. Leave it out"):
        run(model, cache="int4", engine="reference")


def test_a_comparison_refuses_unknown_caches_before_anything_is_made(model, tmp_path):
    with pytest.raises(UserError, match="'int5'.* is not known"):
        compare(model, tmp_path / "out", caches=["int8", "int5"])
    assert not (tmp_path / "out").exists()


def test_text_is_generated_with_every_cache(model):
    written = {cache: "".join(generate(model, "grain", max_tokens=12, cache=cache)) for cache in CACHES}
    assert written["float16"] == written["float32"]
    assert all(written.values())


def test_inspect_says_what_a_token_takes(model):
    found = inspect(model)
    assert (found.cache_bytes_per_token, found.context) == (BYTES, 128)
    for cache in CACHES:
        assert CpuEngine().load(model, cache=cache).cache_bytes_per_token == BYTES[cache]
    shown = CliRunner().invoke(app, ["inspect", str(model)], env={"COLUMNS": "200", "NO_COLOR": "1"}).stdout
    (line,) = [line for line in shown.splitlines() if line.split()[:1] == ["int4"]]
    assert re.split(r"\s{2,}", line.strip()) == ["int4", str(BYTES["int4"]), "15.4 kB"], "120 x 128 bytes"


def test_the_reference_engine_does_not_tell(model):
    assert not hasattr(load_reference(model), "cache_bytes_per_token")


def test_large_key_biases_cost_integer_caches_nothing(tmp_path):
    """Biases as large as Qwen2's would take most of the steps of a key, were they stored with it: the same model without them
    loses as much. What one run differs by is far below a tenth."""
    tool = load_tool("make_synthetic_checkpoint")
    config = tiny_config(
        "qwen2", hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, head_dim=64,
        rope_theta=1e6, max_position_embeddings=512, vocab_size=256, eos_token_id=None,
    )  # fmt: skip
    ids = torch.randint(0, 256, (2, 256), generator=torch.Generator().manual_seed(0))
    losses = {}
    for kind in ("biased", "plain"):
        folder = tool.make(tmp_path / kind, config)
        said = json.loads((folder / "synthetic.json").read_text("utf-8"))
        biases = [tensor for name, tensor in said["tensors"].items() if name.endswith("k_proj.bias")]
        assert all(abs(factor) == tool.KEY_BIAS for tensor in biases for _, factor in tensor["rows"])
        if kind == "plain":
            for tensor in biases:
                tensor.update(rows=[], distribution="constant")
            (folder / "synthetic.json").write_text(json.dumps(said), "utf-8")
        logs = {
            cache: CpuEngine().load(folder, cache=cache).logits(ids).double().log_softmax(-1)
            for cache in ("float32", "int8", "int4")
        }
        exact = logs.pop("float32")
        losses[kind] = {cache: float((exact.exp() * (exact - found)).sum(-1).mean()) for cache, found in logs.items()}
    for cache, limit in (("int8", 0.002), ("int4", 0.1)):
        assert 0 < losses["biased"][cache] < limit
        assert losses["biased"][cache] == pytest.approx(losses["plain"][cache], rel=0.1)
