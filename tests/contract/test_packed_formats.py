"""Formats that quern opens as values: what was stored comes back, by the readers of other tools' checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from artifacts import INT8, hashes, make_artifact, small_recipe, stored_tensors
from foreign_models import words_of
from schemes import gaussian
from tiny_model import tiny_config, write_model

from quern.architectures.base import architecture_of
from quern.checkpoint.foreign.decoded import foreign_weights
from quern.codecs.base import CODECS
from quern.core.errors import UserError
from quern.core.packed import PackedLinear, QuantizedWeight
from quern.core.recipe import Recipe
from quern.engines.base import ENGINES
from quern.formats.base import FORMATS, ArtifactWriter, reader_of, runtimes_of
from quern.loading.fitting import open_model, open_original, open_stored
from quern.pipeline.blockwise.job import plan_of
from quern.pipeline.export import export
from quern.pipeline.planning.sizes import Sizes

MODULE = "model.layers.0.mlp.down_proj"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SCHEMES = {
    **{f"gptq {bits} bits": ("gptq", {"bits": bits, "group_size": 32}) for bits in (2, 3, 4, 8)},
    **{
        f"gptq {bits} bits asymmetric": ("gptq", {"bits": bits, "symmetric": False, "group_size": 32})
        for bits in (2, 3, 4, 8)
    },
    "gptq channels": ("gptq", {"bits": 4, "granularity": "channel"}),
    "gptq channels asymmetric": ("gptq", {"bits": 3, "symmetric": False, "granularity": "channel"}),
    "awq": ("awq", {"bits": 4, "symmetric": False, "group_size": 32}),
    "awq symmetric": ("awq", {"bits": 4, "group_size": 32}),
    "awq channels": ("awq", {"bits": 4, "symmetric": False, "granularity": "channel"}),
}
KEPT = {"overrides": [{"pattern": "*.0.mlp.down_proj", "codec": "none"}]}
"""A linear that no runtime joins with others."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama") / "model", tiny_config("llama"))


def values_of(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of an artifact in format quern as its own codecs decode them."""
    checkpoint = open_model(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    architecture = architecture_of({k: v for k, v in checkpoint.config.items() if k != "quantization_config"})
    reader, shapes = reader_of(config, architecture), architecture.module_shapes()
    assert reader is not None
    found = {}
    for module, stored in reader.plan().items():
        rows, columns = shapes[f"{module}.weight"]
        found[f"{module}.weight"] = CODECS.get(stored.scheme.codec)(stored.scheme).decode(
            (rows, columns), reader.parts(checkpoint, module)
        )
    return found


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("kept", [{}, KEPT], ids=["all", "one kept"])
def test_what_was_stored_comes_back(name, kept, model, tiny_text, tmp_path):
    """Quantized straight into the format, and exported from format quern: the same files, which decode to the same values."""
    format, weights = SCHEMES[name]
    ours = make_artifact(model, tmp_path / "ours", tiny_text, weights=weights, **kept)
    theirs = make_artifact(model, tmp_path / "theirs", tiny_text, format=format, weights=weights, **kept)
    report = export(ours, tmp_path / "exported", format=format)
    assert report.format == format
    wanted, plain, opened = values_of(ours), open_model(model), open_model(theirs)
    assert len(wanted) == 3 * 7 - bool(kept)
    for tensor in opened.names():
        assert torch.equal(opened.read(tensor), wanted[tensor] if tensor in wanted else plain.read(tensor)), tensor
    straight, exported = hashes(theirs), hashes(tmp_path / "exported")
    differing = {file for file in straight | exported if straight.get(file) != exported.get(file)}
    assert differing <= {"quern.json"}
    assert opened.config.get("quantization_config") is None
    assert {weight.bits for weight in foreign_weights(opened).values()} == {weights["bits"]}


def test_the_engines_run_them_as_values(model, tiny_text, tmp_path):
    ids = torch.randint(0, 296, (2, 21), generator=torch.Generator().manual_seed(3))
    for name in ("gptq 4 bits asymmetric", "awq"):
        format, weights = SCHEMES[name]
        paths = [
            make_artifact(model, tmp_path / f"{name}{f}", tiny_text, format=f, weights=weights)
            for f in (format, "quern")
        ]
        logits = [ENGINES.get("reference")().load(path, dtype="float32").logits(ids) for path in paths]
        assert torch.equal(*logits)
        assert ENGINES.get("cpu")().runs(open_model(paths[0])) is None
        recipe = small_recipe(format=format, weights=weights)
        assert ENGINES.get("cpu")().supports(recipe) is None
        assert "quern" in runtimes_of(recipe)
        assert "quantized before" in " ".join(open_original(paths[0]).notes)


def writer_of(recipe: Recipe, **config) -> ArtifactWriter:
    architecture = architecture_of(tiny_config("llama", tie_word_embeddings=False, **config))
    return FORMATS.get(recipe.format).writer(recipe, plan_of(recipe, architecture), architecture)


def rounded(recipe: Recipe, shape=(64, 96)) -> QuantizedWeight:
    codec, weight = CODECS.get("integer")(recipe.weights), gaussian(*shape)
    encoder = codec.encoder(weight, weight, refit=False)
    encoder.round_all(weight)
    return QuantizedWeight(recipe.weights, shape, codec.join([encoder.parts()]))


@pytest.mark.parametrize("name", SCHEMES)
def test_layouts_are_those_of_the_description(name):
    """Against words that are put together code by code as Python integers."""
    format, weights = SCHEMES[name]
    recipe = small_recipe(format=format, weights=weights)
    writer = writer_of(recipe)
    writer.check()
    weight = rounded(recipe)
    stored = writer.encode(MODULE, PackedLinear(weight))
    found = {key.removeprefix(f"{MODULE}."): tensor for key, tensor in stored.items()}
    restored = CODECS.get("integer")(recipe.weights).restored(weight.shape, weight.parts)
    codes, zeros = restored.codes.T.numpy().astype(int), restored.zero.T.numpy().astype(int)
    bits, group = weights["bits"], weights.get("group_size", 96)
    assert torch.equal(found["scales"], weight.parts["scale"].T)
    if format == "gptq":
        less = 1 if recipe.weights.params.symmetric else 0
        assert (found["qweight"].numpy() == words_of(codes, bits)).all()
        assert (found["qzeros"].numpy() == words_of((zeros - less).T, bits).T).all()
        assert found["g_idx"].tolist() == [column // group for column in range(96)]
    else:
        for part, values in (("qweight", codes), ("qzeros", zeros)):
            words = sum(values[:, output::8] << (4 * place) for place, output in enumerate(ORDER))
            assert ((found[part].numpy().astype(int) % 2**32) == words).all()
    assert weight.stored_bytes - writer.saved_bytes(MODULE) == sum(tensor.nbytes for tensor in stored.values())


def test_gptq_says_what_loaders_look_for(model, tiny_text, tmp_path):
    folder = make_artifact(model, tmp_path / "out", tiny_text, format="gptq", weights=SCHEMES["gptq 4 bits"][1], **KEPT)
    said = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    assert said.pop("meta")["quantizer"][0].startswith("quern:")
    assert said == {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "lm_head": False,
        "checkpoint_format": "gptq", "pack_dtype": "int32", "dynamic": {r"-:^model\.layers\.0\.mlp\.down_proj$": {}},
    }  # fmt: skip
    beside = json.loads((folder / "quantize_config.json").read_text("utf-8"))
    assert {key: beside[key] for key in said} == said
    tensors = stored_tensors(folder)
    assert "model.layers.0.mlp.down_proj.weight" in tensors
    assert "model.layers.1.mlp.down_proj.qweight" in tensors
    assert "quantize_config.json" in json.loads((folder / "quern.json").read_text("utf-8"))["files"]


def test_awq_says_what_loaders_look_for(model, tiny_text, tmp_path):
    folder = make_artifact(model, tmp_path / "out", tiny_text, format="awq", weights=SCHEMES["awq channels"][1], **KEPT)
    assert json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"] == {
        "quant_method": "awq", "bits": 4, "group_size": -1, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": ["model.layers.0.mlp.down_proj"],
    }  # fmt: skip


def test_zero_points_less_one_on_request(model, tiny_text, tmp_path):
    """``checkpoint_format: gptq`` has no zero point of 0: what has none is stored, what has one is refused by its name."""
    weights = {"bits": 4, "symmetric": False, "group_size": 32}
    ours = make_artifact(model, tmp_path / "ours", tiny_text, weights=weights)
    export(ours, tmp_path / "less", format="gptq", format_options={"checkpoint-format": "gptq"})
    config = json.loads((tmp_path / "less" / "config.json").read_text("utf-8"))["quantization_config"]
    assert (config["checkpoint_format"], config["sym"]) == ("gptq", False)
    first, second = open_model(tmp_path / "less"), values_of(ours)
    assert all(torch.equal(first.read(name), value) for name, value in second.items())
    recipe = small_recipe(format="gptq", weights=weights)
    writer = writer_of(recipe)
    writer.prepare(open_stored(model), {"checkpoint-format": "gptq"})
    weight = rounded(recipe)
    weight.parts["zero_point"][:] = 0
    with pytest.raises(UserError, match=f"zero points of {MODULE} are 0, .* stores each less one"):
        writer.encode(MODULE, PackedLinear(weight))
    with pytest.raises(UserError, match="no option 'form'; it has: checkpoint-format"):
        writer.prepare(open_stored(model), {"form": "gptq"})
    with pytest.raises(UserError, match="no checkpoint-format 'marlin'; it has: gptq, gptq_v2"):
        writer.prepare(open_stored(model), {"checkpoint-format": "marlin"})


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_scales_become_float16_with_a_note(format, model, tiny_text, tmp_path):
    weights = {"bits": 4, "symmetric": False, "group_size": 32, "scale_dtype": "float32"}
    ours = make_artifact(model, tmp_path / "ours", tiny_text, weights=weights)
    report = export(ours, tmp_path / "out", format=format)
    assert any("scales in float32 become float16" in note and "(21 matrices)" in note for note in report.notes)
    opened, wanted = open_model(tmp_path / "out"), values_of(ours)
    for name, value in wanted.items():
        error = (opened.read(name) - value).abs()
        assert bool((error <= 2**-11 * value.abs() + 2**-20).all()), name  # one rounding of the scale
    recipe = small_recipe(format=format, weights=weights)
    weight = rounded(recipe)
    weight.parts["scale"][0, 0] = 1e6
    with pytest.raises(UserError, match="beyond float16"):
        writer_of(recipe).encode(MODULE, PackedLinear(weight))


def refused(match: str, format: str, config=None, **choices) -> str:
    with pytest.raises(UserError, match=match) as caught:
        writer_of(small_recipe(format=format, **choices), **(config or {})).check()
    return str(caught.value)


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_what_cannot_be_stored_is_refused_with_all_reasons(format):
    fine = {"bits": 4, "group_size": 32}
    refused("integers, not codec 'nf4'", format, weights={"codec": "nf4"})
    refused("embedding and head unquantized", format, weights=fine, embedding=INT8)
    refused(r"embedding and head unquantized.*lm_head", format, weights=fine, head=INT8)
    refused("by channel or group, not by tensor", format, weights={"bits": 4, "granularity": "tensor"})
    refused("rows have 96 inputs, .* group size 64", format, weights={"bits": 4, "group_size": 64})
    refused("no rotation of inputs", format, weights=fine, transforms=[{"method": "hadamard"}])
    refused("no int8 activations", format, weights=fine, activations={"mode": "dynamic"})
    refused("one setting for all linears, and these have 2", format, weights=fine,
            overrides=[{"pattern": "*.down_proj", "bits": 4, "granularity": "channel"}])  # fmt: skip
    refused("q_proj, k_proj, v_proj of .* need one scheme", format, weights=fine,
            overrides=[{"pattern": "*.k_proj", "codec": "none"}])  # fmt: skip
    refused("storage: entropy", format, weights=fine, storage="entropy")
    both = refused(
        "cannot store recipe", format, weights={"bits": 5, "granularity": "tensor"}, embedding=INT8, head=INT8
    )
    assert both.count("\n") >= 4
    assert "bits, not 5" in both
    assert "by tensor" in both
    assert "unquantized" in both


def test_limits_of_each_layout():
    odd = {"intermediate_size": 104}
    refused(
        "rows have 104 inputs, which is not a multiple of 32",
        "gptq",
        odd,
        weights={"bits": 4, "granularity": "channel"},
    )
    refused("packs outputs by 32, and there are 104", "gptq", odd, weights={"bits": 4, "granularity": "channel"})
    writer_of(small_recipe(format="awq", weights={"bits": 4, "granularity": "channel"}), **odd).check()
    odd = {"intermediate_size": 100}
    refused("packs outputs by 8, and there are 100", "awq", odd, weights={"bits": 4, "granularity": "channel"})
    refused("stores 4 bits, not 3", "awq", weights={"bits": 3, "group_size": 32})
    mixed = [{"pattern": "*.down_proj", "symmetric": False, "group_size": 32}]
    refused(
        "4 bits, asymmetric, groups of 32; 4 bits, symmetric",
        "gptq",
        weights={"bits": 4, "group_size": 32},
        overrides=mixed,
    )
    writer_of(small_recipe(format="awq", weights={"bits": 4, "group_size": 32}, overrides=mixed)).check()


@pytest.mark.parametrize("name", ["gptq 3 bits asymmetric", "awq symmetric"])
def test_bytes_are_known_beforehand(name, model, tiny_text, tmp_path):
    """Of tensors exactly; of all files never less than there are, and more by the texts of numbers that only quantizing finds."""
    format, weights = SCHEMES[name]
    folder = make_artifact(model, tmp_path / "out", tiny_text, format=format, weights=weights)
    recipe = small_recipe(format=format, weights=weights)
    checkpoint = open_model(model)
    architecture = architecture_of(checkpoint.config)
    writer = FORMATS.get(format).writer(recipe, plan_of(recipe, architecture), architecture)
    fingerprint = json.loads((folder / "quern.json").read_text("utf-8"))["fingerprint"]
    size = Sizes(checkpoint, architecture, writer, fingerprint).of_artifact(recipe)
    assert size.data == sum(tensor.nbytes for tensor in stored_tensors(folder).values())
    assert 0 <= size.files - sum(path.stat().st_size for path in folder.iterdir()) < 40 * 21
