"""What every format promises, and each format read back by whoever else reads it."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import INT8, make_artifact, small_recipe, stored_tensors
from schemes import gaussian
from tiny_model import tiny_config, write_model

from quern.architectures.base import architecture_of
from quern.checkpoint.foreign.decoded import decoded, foreign_weights
from quern.codecs.base import CODECS
from quern.core.errors import UserError
from quern.core.packed import PackedLinear, QuantizedWeight
from quern.core.recipe import Recipe
from quern.core.scheme import CodecScheme, parse_scheme
from quern.engines.base import ENGINES
from quern.formats.base import FORMATS, ArtifactWriter, reader_of, runtimes_of
from quern.formats.sharded import ShardedWriter
from quern.loading.fitting import open_model, open_stored
from quern.pipeline.blockwise.job import plan_of
from quern.rotation.rotation import rotate

IDS = torch.randint(0, 296, (2, 21), generator=torch.Generator().manual_seed(3))
MODULE = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def untied_model(tmp_path_factory) -> Path:
    """A head of its own, so that it can be quantized without the embedding."""
    return write_model(tmp_path_factory.mktemp("untied") / "model", tiny_config("qwen2", tie_word_embeddings=False))


def rounded(scheme: CodecScheme, shape=(24, 64)) -> QuantizedWeight:
    codec, weight = CODECS.get(scheme.codec)(scheme), gaussian(*shape)
    encoder = codec.encoder(weight, weight, refit=False)
    encoder.round_all(weight)
    return QuantizedWeight(scheme, shape, codec.join([encoder.parts()]))


def writer_of(recipe: Recipe) -> ArtifactWriter:
    architecture = architecture_of(tiny_config("llama", tie_word_embeddings=False))
    return FORMATS.get(recipe.format).writer(recipe, plan_of(recipe, architecture), architecture)


RECIPES = {
    "4-bit groups": {"weights": {"bits": 4, "group_size": 32}},
    "3-bit channels": {"weights": {"bits": 3, "granularity": "channel"}},
    "4-bit asymmetric": {"weights": {"bits": 4, "symmetric": False, "group_size": 32}},
    "8-bit groups": {"weights": {"bits": 8, "group_size": 32}},
    "int8 dynamic": {"weights": INT8, "activations": {"mode": "dynamic"}},
    "int8 static": {"weights": INT8, "activations": {"mode": "static"}},
    "W4A8": {"weights": {"bits": 4, "group_size": 32}, "activations": {"mode": "dynamic"}},
}


def is_sharded(name):
    return issubclass(FORMATS.get(name).writer, ShardedWriter) and not FORMATS.get(name).opened_as_values


SHARDED = [name for name in FORMATS.names() if is_sharded(name)]


@pytest.fixture(params=SHARDED)
def format_name(request):
    return request.param


@pytest.fixture(params=RECIPES)
def choices(request):
    return RECIPES[request.param]


def test_encoding_keeps_every_byte_and_touches_nothing(format_name, choices):
    recipe = small_recipe(format=format_name, **choices)
    writer = writer_of(recipe)
    writer.check()
    scheme = recipe.weights
    weight = rounded(scheme)
    before = {name: part.clone() for name, part in weight.parts.items()}
    scale = 0.25 if recipe.activations.mode == "static" else None
    tensors = writer.encode(MODULE, PackedLinear(weight, recipe.activations.mode, scale))
    assert all(name.startswith(f"{MODULE}.") for name in tensors)
    for name, part in before.items():
        assert torch.equal(part, weight.parts[name])
    stored = {tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors.values() if tensor.dim()}
    assert weight.parts["scale"].contiguous().view(torch.uint8).numpy().tobytes() in stored
    if scheme.params.symmetric is False:
        assert weight.parts["zero_point"].view(torch.uint8).numpy().tobytes() in stored
    assert (f"{MODULE}.input_scale" in tensors) == (scale is not None)
    # compressed-tensors has no packed form of weights in front of int8 activations: a byte each.
    unpacked = math.prod(weight.shape) if f"{MODULE}.weight" in tensors else 0
    assert (
        sum(t.nbytes for t in tensors.values())
        <= max(weight.stored_bytes, weight.parts["scale"].nbytes + unpacked) + 32
    )


def test_config_is_plain_json_and_names_every_module(format_name, choices):
    recipe = small_recipe(format=format_name, **choices)
    writer = writer_of(recipe)
    config = writer.quantization_config(writer.plan)
    text = json.dumps(config, allow_nan=False)
    assert json.loads(text) == config
    assert config["quant_method"] == format_name
    assert all(name in text for name in writer.plan.quantized())


def test_unknown_formats_are_refused_with_the_known_ones():
    with pytest.raises(
        UserError, match="unknown format 'zap'; known: awq, compressed-tensors, gguf, gptq, onnx, quern"
    ):
        FORMATS.get("zap")


# quern's own, read by transformers through the plug-in


PACKED = {name: choices for name, choices in RECIPES.items() if "activations" not in choices} | {
    "everything packed": {
        "weights": {"bits": 2, "group_size": 48},
        "overrides": [{"pattern": "*.o_proj", "codec": "none"}, {"pattern": "*.1.mlp.*", "bits": 6, "symmetric": False, "group_size": 96}],
        "embedding": {"bits": 5, "symmetric": False, "granularity": "group", "group_size": 40},
        "head": {"bits": 3, "granularity": "tensor"},
    }
}  # fmt: skip


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("tied", [True, False])
def test_artifact_computes_what_its_decoded_weights_compute(name, tied, tiny_model, untied_model, tiny_text, tmp_path):
    """A plain model that holds the decoded values (float32, hence exact) gives the same logits, bit for bit."""
    source = tiny_model if tied else untied_model
    folder = make_artifact(source, tmp_path / "out", tiny_text, **PACKED[name])
    engine = ENGINES.get("reference")()
    plain = engine.load(source, dtype="float32").model
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = stored_tensors(folder)
    state = {key: tensor.float() for key, tensor in tensors.items() if key in plain.state_dict()}
    for module, raw in config["modules"].items():
        scheme = parse_scheme(raw["weights"])
        codec, shape = CODECS.get(scheme.codec)(scheme), tuple(plain.get_submodule(module).weight.shape)
        state[f"{module}.weight"] = codec.decode(shape, {p: tensors[f"{module}.{p}"] for p in codec.part_shapes(shape)})
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"} if tied else not missing
    if tied:
        plain.tie_weights()
    loaded = engine.load(folder, dtype="float32")
    with torch.no_grad():
        assert torch.equal(loaded.logits(IDS), plain(IDS, use_cache=False).logits)


# compressed-tensors, read by transformers and the compressed-tensors package


WEIGHT_ONLY = {
    "W4A16 group": {"bits": 4, "group_size": 32},
    "W3A16 group": {"bits": 3, "group_size": 32},
    "W8A16 group": {"bits": 8, "group_size": 32},
    "W4A16 channel": {"bits": 4, "granularity": "channel"},
    "W8A16 channel": {"bits": 8, "granularity": "channel"},
}
ASYMMETRIC = {
    "W4A16 group": {"bits": 4, "symmetric": False, "group_size": 32, "scale_dtype": "float32"},
    "W8A16 channel": {"bits": 8, "symmetric": False, "granularity": "channel", "scale_dtype": "float32"},
}


def both(model, text, folder, **choices):
    """The reference engine's models of one recipe in both formats."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    paths = [
        make_artifact(model, folder / name, text, format=name, **choices) for name in ("quern", "compressed-tensors")
    ]
    return [ENGINES.get("reference")().load(path, dtype="float32") for path in paths]


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_compressed_tensors_weights_give_equal_logits(name, untied_model, tiny_text, tmp_path):
    ours, _ = both(untied_model, tiny_text, tmp_path, weights=WEIGHT_ONLY[name])
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed-tensors", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(ours.logits(IDS), theirs(IDS, use_cache=False).logits)


@pytest.mark.parametrize("name", ASYMMETRIC)
def test_compressed_tensors_zero_points_give_equal_logits(name, untied_model, tiny_text, tmp_path):
    """Through the reference engine, which asks for decompression while loading: compressed-tensors 0.20 allocates the zero
    points unpacked and so cannot load packed ones the other way. It decompresses in the scales' dtype, hence float32 here."""
    ours, theirs = both(untied_model, tiny_text, tmp_path, weights=ASYMMETRIC[name])
    assert torch.equal(ours.logits(IDS), theirs.logits(IDS))


FLOATS = {
    "FP8 channel": {"codec": "float8"},
    "FP8 tensor": {"codec": "float8", "granularity": "tensor"},
    "FP8 block": {"codec": "float8", "granularity": "block", "group_size": 16},
    "MXFP4": {"codec": "mxfp4"},
    "NVFP4": {"codec": "nvfp4"},
}


@pytest.mark.parametrize("name", FLOATS)
def test_compressed_tensors_floats_are_what_was_stored(name, untied_model, tiny_text, tmp_path):
    """By the reader of other tools' checkpoints, and by transformers, which has no quern: equal, but for NVFP4, whose scale is
    stored as its inverse (two roundings of float32), and which the package decompresses in bfloat16."""
    ours, theirs = both(untied_model, tiny_text, tmp_path, weights=FLOATS[name])
    nearly = name == "NVFP4"
    opened = decoded(open_stored(tmp_path / "compressed-tensors"))
    shapes = {f"{n}.weight": m for n, m in ours.model.named_modules() if n.endswith("_proj")}
    assert len(shapes) == 3 * 7
    assert foreign_weights(opened).keys() == shapes.keys()
    for weight, module in shapes.items():
        wanted, found = module.decoded(torch.float32), opened.read(weight)
        assert bool(((found - wanted).abs() <= (2**-22 if nearly else 0) * wanted.abs()).all()), weight
    plain, other = ours.logits(IDS), theirs.logits(IDS)
    if nearly:
        assert bool(((other - plain).abs() <= 0.05 * plain.abs().max()).all())
        assert not torch.equal(other, plain)
    else:
        assert torch.equal(other, plain)


def test_inspect_shows_the_shape_of_packed_floats(untied_model, tiny_text, tmp_path):
    folder = make_artifact(
        untied_model, tmp_path / "out", tiny_text, format="compressed-tensors", weights=FLOATS["MXFP4"]
    )
    checkpoint = open_model(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    reader = reader_of(config["quantization_config"], architecture_of(config))
    described = dict(reader.describe(checkpoint))
    assert described[MODULE].shape == (64, 96)
    assert (described[MODULE].codec, described[MODULE].bits, described[MODULE].granularity) == ("float", 4, "group 32")


def test_compressed_tensors_takes_floats_beside_integers(untied_model, tiny_text, tmp_path):
    choices = {
        "weights": {"bits": 4, "group_size": 32},
        "overrides": [{"pattern": "*.down_proj", "codec": "float8"}, {"pattern": "*.o_proj", "codec": "mxfp4"}],
        "head": {"codec": "float8", "granularity": "tensor"},
    }
    ours, theirs = both(untied_model, tiny_text, tmp_path, **choices)
    assert torch.equal(ours.logits(IDS), theirs.logits(IDS))
    config = json.loads((tmp_path / "compressed-tensors" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert {group["format"] for group in config["config_groups"].values()} == {
        "pack-quantized", "float-quantized", "mxfp4-pack-quantized",
    }  # fmt: skip


def test_compressed_tensors_takes_mixed_recipes(untied_model, tiny_text, tmp_path):
    choices = {
        "weights": {"bits": 4, "group_size": 32},
        "overrides": [{"pattern": "*.down_proj", "codec": "none"}, {"pattern": "*.o_proj", "bits": 8, "granularity": "channel"}],
        "head": {"bits": 8, "granularity": "channel"},
    }  # fmt: skip
    ours, theirs = both(untied_model, tiny_text, tmp_path, **choices)
    assert torch.equal(ours.logits(IDS), theirs.logits(IDS))
    config = json.loads((tmp_path / "compressed-tensors" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]


@pytest.mark.parametrize(
    ("weights", "mode"),
    [
        (INT8, "dynamic"),
        (INT8, "static"),
        ({**INT8, "granularity": "tensor"}, "dynamic"),
        ({**INT8, "granularity": "tensor"}, "static"),
        ({"bits": 4, "group_size": 32}, "dynamic"),
        ({"bits": 4, "granularity": "channel"}, "dynamic"),
    ],
    ids=str,
)
def test_compressed_tensors_int8_activations_agree_module_by_module(weights, mode, untied_model, tiny_text, tmp_path):
    """On identical inputs, because ties of the activation rounding flip over depth.

    Both quantize x to the same int8. Ours multiplies integers exactly and then scales twice; theirs multiplies what they
    dequantized, with K float32 terms. So they differ by at most (K + 4) eps sum_k |x_k w_k| (Higham 2002, section 3.1).
    The head is packed 4-bit and its inputs stay as they are: equal.
    """
    choices = {
        "weights": weights,
        "activations": {"mode": mode},
        "head": {"bits": 4, "group_size": 32},
    }
    ours, theirs = both(untied_model, tiny_text, tmp_path, **choices)
    theirs.logits(IDS)  # decompresses
    seen = {}
    hooks = [
        module.register_forward_hook(lambda _, inputs, output, name=name: seen.__setitem__(name, (inputs[0], output)))
        for name, module in ours.model.named_modules()
        if name.endswith("_proj") or name == "lm_head"
    ]
    ours.logits(IDS)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 3 * 7 + 1
    with torch.no_grad():
        for name, (inputs, output) in seen.items():
            their_output = theirs.model.get_submodule(name)(inputs)
            if name == "lm_head":
                assert torch.equal(their_output, output)
                continue
            module = ours.model.get_submodule(name)
            sizes = inputs.abs() @ module.decoded(torch.float32).abs().T
            if module.bias is not None:
                sizes = sizes + module.bias.abs()
            bound = (
                (inputs.shape[-1] + 4) * 2.0**-24 * 1.01 * sizes
            )  # rounding makes some |x| larger, by at most 1 % in sum
            assert bool(((their_output - output).abs() <= bound).all()), name


ROTATION = [{"method": "hadamard", "random_signs": False}]
ROTATED = {
    "W4A16 group": {"weights": {"bits": 4, "group_size": 32}},
    "W4A16 asymmetric": {"weights": {**ASYMMETRIC["W4A16 group"]}},
    "W8A8": {"weights": INT8, "activations": {"mode": "dynamic"}},
    "mixed": {
        "weights": {"bits": 4, "group_size": 32},
        "overrides": [{"pattern": "*.0.mlp.down_proj", "codec": "none"}],
        "head": {"bits": 8, "granularity": "channel"},
    },
}


@pytest.mark.parametrize("name", ROTATED)
def test_compressed_tensors_rotations_agree_module_by_module(name, untied_model, tiny_text, tmp_path):
    """On identical inputs. Columns are 64 and 96, so the blocks of the rotations have 64 and 32.

    Ours adds and subtracts in log2(B) steps, theirs sums B products: errors of each rotated value are at most (B + 3) eps
    and (log2 B + 2) eps times sum |x| / sqrt(B) over the block, hence (2 B) eps of it in all. Then K products are summed.
    """
    choices = ROTATED[name]
    ours, theirs = both(untied_model, tiny_text, tmp_path, transforms=ROTATION, **choices)
    theirs.logits(IDS)  # decompresses
    seen = {}
    linears = {n: m for n, m in ours.model.named_modules() if getattr(m, "rotated", False)}
    assert len(linears) == 3 * 7 - ("overrides" in choices)
    for module_name, module in linears.items():
        module.register_forward_hook(lambda _, i, o, module_name=module_name: seen.__setitem__(module_name, (i[0], o)))
    ours.logits(IDS)
    int8 = "activations" in choices
    with torch.no_grad():
        for module_name, (inputs, output) in seen.items():
            module, their_output = linears[module_name], theirs.model.get_submodule(module_name)(inputs)
            columns = inputs.shape[-1]
            block = columns & -columns
            spread = inputs.abs().unflatten(-1, (-1, block)).sum(-1, keepdim=True).expand(*inputs.shape[:-1], -1, block)
            spread = spread.flatten(-2) / block**0.5
            weight = module.decoded(torch.float32).abs()
            bound = (2 * block + columns + 4) * 2.0**-24 * (spread @ weight.T)
            if int8:  # a value on the edge of two codes may round to either: one step of the token's scale
                rotated = rotate(inputs, module.input_signs)
                flips = ((rotated / (scale := rotated.abs().amax(-1, keepdim=True) / 127.5)) % 1 - 0.5).abs() < 1e-2
                bound = 2 * bound + (flips * scale) @ weight.T
            assert bool(((their_output - output).abs() <= bound).all()), module_name
            if not int8:  # the comparison can fail
                module.input_signs[0] = 1
                assert not bool(((module(inputs) - output).abs() <= bound).all())


def test_compressed_tensors_rotations_are_what_its_own_package_applies(untied_model, tiny_text, tmp_path):
    """By the example of docs/compressed-tensors.md for transformers, which reads no transform_config."""
    ours, theirs = both(untied_model, tiny_text, tmp_path, transforms=ROTATION, weights=WEIGHT_ONLY["W4A16 group"])
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "compressed-tensors"
    page = (Path(__file__).resolve().parents[2] / "docs" / "compressed-tensors.md").read_text("utf-8")
    example = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[-1]
    names: dict[str, Any] = {}
    exec(example.replace('"quantized"', repr(str(folder))).replace("(folder)", "(folder, dtype='float32')"), names)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = ours.logits(IDS)
    bound = 1e-4 * expected.abs().max()  # float32 rounding of a rotation, amplified by three blocks
    with torch.no_grad():
        found = names["model"](IDS, use_cache=False).logits
        assert not bool(((plain(IDS, use_cache=False).logits - expected).abs() <= bound).all())
    assert torch.equal(found, theirs.logits(IDS))
    assert bool(((found - expected).abs() <= bound).all())
    groups = names["config"]["transform_config"]["config_groups"]
    assert {name: group["head_dim"] for name, group in groups.items()} == {"rotation_32": 32, "rotation_64": 64}


@pytest.mark.parametrize(
    ("change", "match"),
    [({"type": "random-hadamard"}, "random-hadamard, randomize: False"), ({"randomize": True}, "hadamard, randomize: True"),
     ({"head_dim": 48}, "unusable transform_config: 48 must divide 64"), ({"zap": 1}, "unusable transform_config"),
     ({"type": "zap"}, "transformed \\(zap")],
)  # fmt: skip
def test_other_transforms_of_compressed_tensors_are_refused(change, match, untied_model, tiny_text, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    choices = {"weights": WEIGHT_ONLY["W4A16 group"], "transforms": ROTATION}
    folder = make_artifact(untied_model, tmp_path / "out", tiny_text, format="compressed-tensors", **choices)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["transform_config"]["config_groups"]["rotation_64"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=match):
        ENGINES.get("reference")().load(folder)


def refused(match: str, **choices):
    recipe = small_recipe(format="compressed-tensors", **choices)
    with pytest.raises(UserError, match=match):
        writer_of(recipe).check()


def test_compressed_tensors_says_what_it_cannot_store():
    refused("rows have 96 inputs, which is not a multiple of the group size 64", weights={"bits": 4, "group_size": 64})
    refused("rows have 96 inputs, .* group size 128", weights={"bits": 4, "group_size": 128})
    refused("no quantized embedding; set embedding: {codec: none}", weights={"group_size": 32}, embedding=INT8)
    refused("floating-point codes, not codec 'nf4'; set codec: integer", weights={"codec": "nf4"})
    refused("codes are e4m3; set variant", weights={"codec": "float8", "variant": "e5m2"})
    refused("codes have no groups in it", weights={"codec": "float8", "granularity": "group", "group_size": 32})
    refused("1-bit integers", weights={"bits": 1, "group_size": 32})
    refused("per tensor is not part of it", weights={"bits": 4, "granularity": "tensor"})
    refused("per tensor is not part of it", weights=INT8, activations={"mode": "dynamic"},
            head={"bits": 8, "granularity": "tensor"})  # fmt: skip
    dynamic, four = {"mode": "dynamic"}, {"bits": 4, "group_size": 32}
    by_groups = {**dynamic, "granularity": "group", "group_size": 32}
    refused("one scale a token or tensor, none by group", weights=four, activations=by_groups)
    refused(
        "8-bit weights in front of int8 activations have no groups", weights={**four, "bits": 8}, activations=dynamic
    )
    refused(
        "by channel or group in it, not by tensor", weights={"bits": 4, "granularity": "tensor"}, activations=dynamic
    )
    refused("below 8 bits go with dynamic int8 activations", weights=four, activations={"mode": "static"})
    for override in ({"bits": 8, "granularity": "channel"}, {"codec": "none"}):
        for name in ("q_proj", "k_proj", "v_proj"):
            refused(
                r"q_proj, k_proj, v_proj of model\.layers\.0\.self_attn need one scheme, because vLLM joins them",
                weights={"bits": 4, "group_size": 32},
                overrides=[{"pattern": f"*.{name}", **override}],
            )


def test_scales_that_vllm_would_join_keep_it_away():
    assert "vllm" in runtimes_of(small_recipe(format="compressed-tensors", weights=FLOATS["MXFP4"]))
    assert "vllm" not in runtimes_of(small_recipe(format="compressed-tensors", weights=FLOATS["NVFP4"]))


def test_the_least_loaders_expect_is_there():
    """Names and shapes as compressed-tensors' own compressor writes them."""
    recipe = small_recipe(format="compressed-tensors", weights={"bits": 4, "symmetric": False, "group_size": 32})
    packed = writer_of(recipe).encode(MODULE, PackedLinear(rounded(recipe.weights)))
    assert {n.removeprefix(MODULE + "."): (tuple(t.shape), t.dtype) for n, t in packed.items()} == {
        "weight_packed": ((24, 8), torch.int32),
        "weight_scale": ((24, 2), torch.float16),
        "weight_zero_point": ((3, 2), torch.int32),
        "weight_shape": ((2,), torch.int64),
    }
    assert packed[f"{MODULE}.weight_shape"].tolist() == [24, 64]
    recipe = small_recipe(
        format="compressed-tensors", weights={**INT8, "granularity": "tensor"}, activations={"mode": "static"}
    )
    whole = writer_of(recipe).encode(MODULE, PackedLinear(rounded(recipe.weights), "static", 0.1))
    assert {n.removeprefix(MODULE + "."): (tuple(t.shape), t.dtype) for n, t in whole.items()} == {
        "weight": ((24, 64), torch.int8),
        "weight_scale": ((1,), torch.float16),
        "input_scale": ((1,), torch.float32),
    }
    recipe = small_recipe(
        format="compressed-tensors", weights={"bits": 4, "group_size": 32}, activations={"mode": "dynamic"}
    )
    narrow = writer_of(recipe)
    signed = narrow.encode(MODULE, PackedLinear(weight := rounded(recipe.weights), "dynamic"))
    assert {n.removeprefix(MODULE + "."): (tuple(t.shape), t.dtype) for n, t in signed.items()} == {
        "weight": ((24, 64), torch.int8),
        "weight_scale": ((24, 2), torch.float16),
    }
    decoded = CODECS.get("integer")(recipe.weights).decode((24, 64), weight.parts)
    by_group = signed[f"{MODULE}.weight"].float().view(24, 2, 32) * signed[f"{MODULE}.weight_scale"].float()[:, :, None]
    assert torch.equal(by_group.flatten(1), decoded)
    assert any("4 bits in front of int8 activations take a byte each" in note for note in narrow.notes())
    assert any("on CPUs only" in note for note in narrow.notes())
    assert math.isclose(float(whole[f"{MODULE}.input_scale"]), 0.1, rel_tol=2**-23)
