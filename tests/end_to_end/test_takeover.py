"""Rounding ``stored``: what another tool quantized becomes an artifact with exactly the same values."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import small_recipe, stored_schemes, stored_tensors
from foreign_models import VARIANTS, Variant, change, compressed, gptq, plain_copy, write_foreign
from gguf import GGMLQuantizationType
from gguf_model import write_gguf
from tiny_model import tiny_config, write_model

from quern.codecs.base import codec_of
from quern.core.errors import UserError
from quern.core.recipe import Recipe
from quern.engines.base import ENGINES, engine_for
from quern.loading.fitting import open_model, open_original
from quern.pipeline.blockwise import job
from quern.pipeline.quantize import quantize

IDS = torch.tensor([[1, 5, 17, 40, 95, 0, 3, 64]])
STORED = {"method": "stored"}
BF16 = {"scale_dtype": "bfloat16"}
UNEVEN = {"symmetric": False, "group_size": 32}
CHANNEL = {"granularity": "channel"}
INTEGERS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}

SCHEMES: dict[str, dict[str, Any]] = {
    **{f"gptq {bits} bits": {"bits": bits, **UNEVEN} for bits in (2, 3, 4, 8)},
    "gptq symmetric": {"bits": 4, "group_size": 32},
    "gptq one group": {"bits": 4, "symmetric": False, **CHANNEL},
    "gptq without g_idx": UNEVEN,
    "gptq_v2": UNEVEN,
    **{f"gptq {bits} bits by GPTQModel": {"bits": bits, **UNEVEN} for bits in (2, 4, 8)},
    "awq": UNEVEN,
    "awq one group": {"symmetric": False, **CHANNEL},
    "compressed-tensors int4": {"group_size": 32, **BF16},
    "compressed-tensors int4 asymmetric": UNEVEN | BF16,
    "compressed-tensors int3": {"bits": 3, **UNEVEN, **BF16},
    "compressed-tensors int8 packed": {"bits": 8, **CHANNEL, **BF16},
    "compressed-tensors int8": {"bits": 8, **CHANNEL, **BF16},
    "compressed-tensors int8 asymmetric": {"bits": 8, "symmetric": False, "granularity": "tensor", **BF16},
    "compressed-tensors mxfp4": {"codec": "mxfp4"},
    "fp8 blocks beyond the matrix": {"codec": "float8", "granularity": "block", "group_size": 128},
    "fp8 scalar": {"codec": "float8", "granularity": "tensor"},
    "fp8 channel": {"codec": "float8"},
    "compressed-tensors fp8 channel": {"codec": "float8", **BF16},
}
FURTHER: dict[str, tuple[Variant, dict[str, Any]]] = {
    "gptq_v2 symmetric, last group short": (gptq(4, 48, "gptq_v2", sym=True), {"group_size": 48}),
    "compressed-tensors float32 scales": (
        compressed(INTEGERS, "pack-quantized", "group 32", torch.float32), {"group_size": 32, "scale_dtype": "float32"}
    ),
}  # fmt: skip
CASES = {**{name: (VARIANTS[name], scheme) for name, scheme in SCHEMES.items()}, **FURTHER}


def taking(weights: dict[str, Any], **choices: Any) -> Recipe:
    return small_recipe(weights=weights, rounding=STORED, **choices)


def stored_values(folder: Path) -> dict[str, torch.Tensor]:
    """What every packed weight of an artifact decodes to, float32."""
    tensors, values = stored_tensors(folder), {}
    for module, scheme in stored_schemes(folder).items():
        parts = {name.rpartition(".")[2]: part for name, part in tensors.items() if name.rpartition(".")[0] == module}
        shape = next(shape for name, shape in shapes(folder).items() if name == f"{module}.weight")
        values[f"{module}.weight"] = codec_of(scheme).decode(shape, parts)
    return values


def shapes(folder: Path) -> dict[str, Any]:
    from quern.architectures.base import architecture_of

    return architecture_of(json.loads((folder / "config.json").read_text("utf-8"))).module_shapes()


def logits(path: Path, engine: str = "reference") -> torch.Tensor:
    return ENGINES.get(engine)().load(path, dtype="float32").logits(IDS)


@pytest.mark.parametrize("name", CASES)
def test_an_artifact_of_exactly_the_same_values(name, tmp_path):
    variant, scheme = CASES[name]
    model = write_foreign(tmp_path / "model", variant)
    report = quantize(model.folder, tmp_path / "out", recipe=taking(scheme))
    source = open_original(model.folder)
    values = stored_values(report.path)
    assert set(values) == set(model.values)
    for weight, value in values.items():
        assert torch.equal(value, source.read(weight)), weight
        if variant.exact and scheme.get("scale_dtype") != "float32":  # whose values are the nearest float32
            assert torch.equal(value.double(), model.values[weight]), weight
    assert [layer.relative_error for layer in report.layers] == [0.0] * 14
    assert torch.equal(logits(report.path), logits(plain_copy(model, tmp_path / "plain")))
    if not name.startswith("compressed"):  # transformers runs those, in its own arithmetic
        assert torch.equal(logits(report.path), logits(model.folder))
    said = "14 linears have exactly the values that the checkpoint's have: taken over, not rounded again"
    assert said in report.notes
    assert said in json.loads((report.path / "quern.json").read_text("utf-8"))["notes"]

    eight = (scheme.get("bits"), scheme.get("symmetric")) == (8, False)
    assert engine_for(open_model(report.path)) == ("reference" if eight else "cpu")
    if not eight:  # packed weights, inputs in int8
        ours, exactly = logits(report.path, "cpu"), logits(report.path)
        assert float((ours - exactly).norm() / exactly.norm()) < 0.05


def write_llama(folder: Path, kind: GGMLQuantizationType) -> Path:
    """A Llama whose matrices a GGUF stores as ``kind``; q and k are in another order there."""
    write_model(folder, tiny_config("llama", num_hidden_layers=2))
    return write_gguf(folder, folder.with_suffix(".gguf"), kind=kind)[0]


@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", 8), ("Q4_0", 4)])
def test_blocks_of_a_gguf_are_groups(kind, bits, tmp_path):
    """Those of Q4_0 reach from -8 to 7 times a scale that is negative where the largest weight is positive."""
    file = write_llama(tmp_path / "model", GGMLQuantizationType[kind])
    report = quantize(file, tmp_path / "out", recipe=taking({"bits": bits, "group_size": 32}))
    source = open_original(file)
    values = stored_values(report.path)
    assert len(values) == 14
    assert all(torch.equal(value, source.read(weight)) for weight, value in values.items())
    assert torch.equal(logits(report.path), logits(file))
    negative = {bool((part < 0).any()) for name, part in stored_tensors(report.path).items() if name.endswith(".scale")}
    assert negative == {bits == 4}
    ours = logits(report.path, "cpu")
    assert float((ours - logits(file)).norm() / ours.norm()) < 0.05


def refused(model: Path, output: Path, recipe: Recipe, **further: Any) -> str:
    """The reason; nothing is left behind."""
    with pytest.raises(UserError) as caught:
        quantize(model, output, recipe=recipe, **further)
    assert not list(output.parent.glob(f"{output.name}*"))
    return str(caught.value)


def test_what_is_not_on_the_grid_is_refused_with_the_scheme_that_it_has(tmp_path):
    model = write_foreign(tmp_path / "model", VARIANTS["awq"]).folder
    for wrong in (
        {"symmetric": True, "group_size": 32},
        {"bits": 3, **UNEVEN},
        {"symmetric": False, "group_size": 64},
        {"symmetric": False, "granularity": "tensor"},
    ):
        told = refused(model, tmp_path / "out", taking(wrong))
        assert told.startswith("model.layers.0.self_attn.q_proj: rounding stored: these weights are not values of {")
        found = "{codec: integer, bits: 4, symmetric: false, granularity: group, group_size: 32, scale_dtype: float16}"
        assert f"but the first of them are of {found}" in told
        assert "rounding nearest or gptq takes any weights" in told
    scales = write_foreign(tmp_path / "scales", FURTHER["compressed-tensors float32 scales"][0]).folder
    assert "scale_dtype: float32}. Set that" in refused(scales, tmp_path / "out", taking({"group_size": 32}))
    assert quantize(model, tmp_path / "out", recipe=taking(UNEVEN)).layers


@pytest.mark.parametrize("name", ["gptq desc_act", "fp8 channel", "bitsandbytes nf4", None])
def test_weights_without_a_grid_of_integers_are_refused(name, tiny_model, tmp_path):
    model = tiny_model if name is None else write_foreign(tmp_path / "model", VARIANTS[name]).folder
    told = refused(model, tmp_path / "out", taking(UNEVEN))
    assert "nor does another scheme of that codec" in told
    assert "GPTQ's desc_act" in told


def test_desc_act_in_order_is_taken_over(tmp_path):
    """Its groups are neighbours after all."""
    variant = gptq(4, 32)
    variant.config["desc_act"] = True
    model = write_foreign(tmp_path / "model", variant)
    report = quantize(model.folder, tmp_path / "out", recipe=taking(UNEVEN))
    assert all(
        torch.equal(value.double(), model.values[weight]) for weight, value in stored_values(report.path).items()
    )


def test_a_later_block_is_refused_by_its_name(tmp_path):
    """Only the first one is looked at before the start."""
    model = write_foreign(tmp_path / "model", VARIANTS["awq"])

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.1.mlp.up_proj"
        packed = [part for part in tensors if part.startswith(f"{name}.")]
        for part in packed:
            del tensors[part]
        tensors[f"{name}.weight"] = torch.randn(model.values[f"{name}.weight"].shape)

    folder = change(model, tmp_path / "mixed", edit)
    with pytest.raises(UserError, match=r"^model\.layers\.1\.mlp\.up_proj: rounding stored"):
        quantize(folder, tmp_path / "out", recipe=taking(UNEVEN))
    rest = {"pattern": "model.layers.1.mlp.up_proj", "rounding": {"method": "nearest"}}
    report = quantize(folder, tmp_path / "out", recipe=taking(UNEVEN, overrides=[rest]), fresh=True)
    assert [layer.linear for layer in report.layers if layer.relative_error > 0] == [rest["pattern"]]
    assert any(note.startswith("13 linears have exactly the values") for note in report.notes)


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        ({"transforms": [{"method": "smoothquant"}]}, "transform smoothquant would change them"),
        ({"transforms": [{"method": "hadamard"}]}, "transform hadamard would change them"),
        ({"weights": {"codec": "nf4"}}, r"codec nf4 cannot find its codes .* \(float8, integer, mxfp4\)"),
        ({"calibration": {"compute_dtype": "bfloat16"}}, r"Set calibration: \{compute_dtype: float32\}"),
        ({"allocation": {"candidates": [{"bits": 4}, {"bits": 8}], "target": {"bits": 6}}}, "leave out the allocation"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_change_values_is_refused_before_anything_is_read(choices, told, tmp_path, tiny_text):
    model = write_foreign(tmp_path / "model", VARIANTS["awq"], tokenizer=True).folder
    recipe = small_recipe(**{"weights": UNEVEN, "rounding": STORED, **choices})
    reason = refused(model, tmp_path / "out", recipe, calibration=[tiny_text])
    assert re.search(told, reason), reason
    if "allocation" not in choices:
        assert "rounding stored keeps the values that weights have (model.layers.0.self_attn.q_proj)" in reason


def test_a_rotation_of_other_linears_is_no_obstacle(tmp_path):
    model = write_foreign(tmp_path / "model", VARIANTS["awq"])
    override = {"pattern": "*.mlp.*", "rounding": {"method": "nearest"}, "rotated": True, **UNEVEN}
    kept = {"pattern": "*.self_attn.*", "rotated": False}
    recipe = taking(UNEVEN, transforms=[{"method": "hadamard"}], overrides=[override, kept])
    report = quantize(model.folder, tmp_path / "out", recipe=recipe)
    assert {layer.relative_error == 0 for layer in report.layers if ".self_attn." in layer.linear} == {True}


def test_large_models_are_not_handled_as_bfloat16(tmp_path, monkeypatch):
    model = write_foreign(tmp_path / "model", VARIANTS["awq"])
    monkeypatch.setattr(job, "LARGE", 1)
    report = quantize(model.folder, tmp_path / "out", recipe=taking(UNEVEN))
    assert all(
        torch.equal(value.double(), model.values[weight]) for weight, value in stored_values(report.path).items()
    )
    rounded = quantize(model.folder, tmp_path / "again", recipe=small_recipe(weights=UNEVEN))
    assert max(layer.relative_error for layer in rounded.layers) > 0


def test_small_scales_keep_their_dtype(tmp_path):
    """float16 has fewer bits for scales below 2^-14, so that weights so small get bfloat16 where they are rounded."""
    model = write_foreign(tmp_path / "model", VARIANTS["gptq symmetric"])

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".scales")]:
            tensors[name] *= 2.0**-14

    folder = change(model, tmp_path / "small", edit)
    report = quantize(folder, tmp_path / "out", recipe=taking({"group_size": 32}))
    source = open_original(folder)
    assert all(torch.equal(value, source.read(weight)) for weight, value in stored_values(report.path).items())
    assert not any("bfloat16" in note for note in report.notes)


def test_the_other_format_and_calibrated_inputs_take_them_too(tmp_path, tiny_text):
    model = write_foreign(tmp_path / "model", VARIANTS["gptq symmetric"], tokenizer=True)
    recipe = taking({"group_size": 32}, format="compressed-tensors")
    report = quantize(model.folder, tmp_path / "out", recipe=recipe)
    assert engine_for(open_model(report.path)) == "reference"
    assert torch.equal(logits(report.path), logits(model.folder))
    static = taking({"bits": 8, **CHANNEL, **BF16}, activations={"mode": "static"})
    eight = write_foreign(tmp_path / "eight", VARIANTS["compressed-tensors int8"], tokenizer=True)
    report = quantize(eight.folder, tmp_path / "static", recipe=static, calibration=[tiny_text])
    assert all(
        torch.equal(value.double(), eight.values[weight]) for weight, value in stored_values(report.path).items()
    )
