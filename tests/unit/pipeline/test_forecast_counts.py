"""What a forecast counts, against the things themselves: bytes that were written, operations that ran, a folder that grew."""

import json
import math

import pytest
import torch
from tiny_model import tiny_config, write_model
from torch.utils.flop_counter import FlopCounterMode

import quern
from quern.advisor.forecasting.operations import forward_operations
from quern.checkpoint.checkpoint import Checkpoint
from quern.core.recipe import load_recipe, parse_recipe
from quern.formats.base import FORMATS
from quern.pipeline.blockwise.job import plan_of
from quern.pipeline.forecasting import counted
from quern.pipeline.forecasting.counted import bytes_of, case_of, disk_of
from quern.pipeline.forecasting.shrunk import write_tokenizer
from quern.pipeline.forecasting.subject import open_subject
from quern.pipeline.planning.sizes import Sizes

GPTQ4 = {
    "name": "gptq4",
    "weights": {"bits": 4, "granularity": "group", "group_size": 32},
    "rounding": {"method": "gptq"},
    "calibration": {"tokens": 1024, "sequence_length": 64},
}
NEAREST = {**GPTQ4, "name": "nearest", "rounding": {"method": "nearest"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "model", tiny_config(hidden_size=128, intermediate_size=192))


def case(path, recipe):
    return case_of(open_subject(path), parse_recipe(recipe, "test"))


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("recipe", [GPTQ4, NEAREST], ids=lambda recipe: recipe["name"])
def test_bytes_and_the_folder_while_it_is_made(model, tmp_path, recipe):
    class Watch:
        """Looks at the folder after every step."""

        def __init__(self):
            self.most = 0

        def task(self, description, total, done=0, work=None):
            return self

        def log(self, message):
            pass

        def advance(self, steps=1):
            self.most = max(self.most, size(tmp_path))

        done = advance

    told = case(model, recipe)
    artifact = bytes_of(told).files
    disk = disk_of(told, 2)
    watch = Watch()
    report = quern.quantize(model, tmp_path / "out", recipe=told.recipe, threads=2, progress=watch)
    linears, inputs = len(report.layers), 4 * told.architecture.layers
    assert abs(artifact.value - report.bytes) <= 6 * linears + 60 * inputs  # texts of numbers that nobody knows before
    assert watch.most <= disk.value * 1.02 + 40_000  # the journal is not counted
    assert watch.most >= 0.6 * disk.value


def test_one_number_of_the_derivation_is_the_sum_of_the_others(model):
    told = bytes_of(case(model, NEAREST)).files
    data, rest, total = (int(word.replace(",", "")) for word in told.derivation.split() if word[0].isdigit())
    assert data + rest == total == told.value


def test_operations_are_those_that_run():
    told = case_of(open_subject_of(tiny_config()), load_recipe("rtn4"))
    block = told.architecture.build_block(0).to_empty(device="cpu")
    linears = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for linear in linears:
            linear(torch.zeros(7, linear.in_features))
    assert forward_operations(told.architecture) * 7 == counter.get_total_flops() * told.architecture.layers


def open_subject_of(config):
    import tempfile
    from pathlib import Path

    folder = Path(tempfile.mkdtemp(prefix="quern-test-"))
    try:
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
        return open_subject(folder)
    finally:
        (folder / "config.json").unlink()
        folder.rmdir()


def test_more_tokens_and_fisher_weights_are_more_work(model):
    fisher = case(model, GPTQ4)
    plain = case(model, {**GPTQ4, "calibration": {**GPTQ4["calibration"], "token_weight": "none"}})
    nearest = case(model, NEAREST)
    drift = case(model, {**GPTQ4, "rounding": {"method": "gptq", "target": "drift"}})
    assert nearest.work.token_operations == 0 == nearest.work.feedback_operations
    forward = fisher.forward_operations
    # Fisher token weights: one pass forward, and one backward that computes it again; a Hessian for each linear instead
    # of one for each input.
    hessians = 3 * (2 * 2 * 128**2 + 2 * 128**2)
    assert fisher.work.token_operations - plain.work.token_operations == 3 * forward + hessians
    assert drift.work.token_operations > fisher.work.token_operations
    assert fisher.work.weights.total() == nearest.work.weights.total() == forward // 2


def test_no_weight_is_read_for_a_machine_that_is_not_here(model, monkeypatch):
    monkeypatch.setattr(Checkpoint, "read", lambda *_, **__: pytest.fail("a weight was read"))
    monkeypatch.setattr(Checkpoint, "sha256", lambda *_, **__: pytest.fail("the weights were hashed"))
    found = quern.forecast(model, recipes=["compact", "rtn4"], on="desktop-16-core")
    for one in found.recipes:
        assert one.artifact_bytes.value > 0
        assert one.decode.value > 0
        assert {one.decode.basis, one.prefill.basis, one.run_memory.basis, one.quantize_seconds.basis} == {"predicted"}


def test_a_configuration_alone_is_enough_and_says_the_same(model, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (model / name).is_file():
            (tmp_path / name).write_bytes((model / name).read_bytes())
    whole, alone = bytes_of(case(model, GPTQ4)), bytes_of(case(tmp_path, GPTQ4))
    assert whole.read == alone.read
    assert whole.data == alone.data
    assert math.isclose(whole.files.value, alone.files.value, rel_tol=1e-3)
    assert bytes_of(case(tmp_path / "config.json", GPTQ4)).files.value == alone.files.value


def test_a_72b_that_lies_nowhere(tmp_path):
    config = {
        "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "vocab_size": 152064,
        "max_position_embeddings": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "hidden_size": 8192,
        "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    (one,) = quern.forecast(tmp_path, recipes=["compact"], on="gpu-24gb", context=4096).recipes
    # 2 bits for gate and up, 3 for the rest, 4.63 for embedding and head
    gate_up, rest = 80 * 2 * 29568 * 8192, 80 * (29568 * 8192 + 2 * 8192 * 8192 + 2 * 1024 * 8192)
    outer = 2 * 152064 * 8192
    assert math.isclose(one.artifact_bytes.value, gate_up * 2 / 8 + rest * 3 / 8 + outer * 4.625 / 8, rel_tol=0.005)
    assert one.contexts["float16"].value == 0
    assert "too little" in one.contexts["float16"].derivation
    assert one.decode.value is None
    assert "processors" in one.decode.derivation


@pytest.mark.parametrize("rows", [512, 777, 1536, 1600])
@pytest.mark.parametrize(
    ("recipe", "format"),
    [("compact", "quern"), ("rtn4", "quern"), ("nvfp4", "quern"), ("q4_k", "gguf"), ("q8_0", "gguf"), ("rtn4", "gptq")],
)
def test_sizes_from_few_rows_are_those_of_all(tmp_path, recipe, format, rows):
    config = tiny_config(hidden_size=256, head_dim=64, intermediate_size=rows, vocab_size=320, num_hidden_layers=1)
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    subject = open_subject(tmp_path)
    plan = plan_of(load_recipe(recipe), subject.architecture)["model.layers.0.mlp.gate_proj"]
    write_tokenizer(tmp_path)
    writer = FORMATS.get(format).writer(load_recipe(recipe), {}, subject.architecture)
    writer.prepare(subject.checkpoint, {})
    few, whole = (kind(subject.checkpoint, subject.architecture, writer, {}) for kind in (counted._UsualSizes, Sizes))
    found, wanted = (sizes._encoded((rows, 256), plan) for sizes in (few, whole))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in wanted.items()
    }
