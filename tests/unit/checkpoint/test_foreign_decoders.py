"""Decoders of other tools' weights against plain references and against libraries, and what each of them refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from foreign_models import VARIANTS, ForeignModel, change, words_of, write_foreign, write_mxfp4
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quern.checkpoint.checkpoint import open_checkpoint
from quern.checkpoint.foreign import _arithmetic
from quern.checkpoint.foreign.decoded import decoded, foreign_weights
from quern.core.errors import BadFileError, UserError
from quern.loading.fitting import open_original

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Makes each model once."""
    made: dict[str, ForeignModel] = {}

    def get(name: str) -> ForeignModel:
        if name not in made:
            made[name] = write_foreign(tmp_path_factory.mktemp("model"), VARIANTS[name])
        return made[name]

    return get


def stored_parts(model: ForeignModel, module: str = UP) -> dict[str, torch.Tensor]:
    tensors = load_file(model.folder / "model.safetensors")
    return {name.removeprefix(f"{module}."): value for name, value in tensors.items() if name.startswith(f"{module}.")}


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 10, 11, 31, 32, 33, 96])
def test_codes_come_out_of_words_as_one_long_number_holds_them(bits, count):
    codes = np.random.default_rng(bits * 100 + count).integers(0, 2**bits, (count, 3))
    words = words_of(codes, bits)
    assert words.shape[0] == _arithmetic.words_for(count, bits)
    assert np.array_equal(_arithmetic.unpack_words(words, bits, count), codes)


def test_every_power_of_two_is_exact():
    exponents = np.arange(255, dtype=np.uint8)
    assert _arithmetic.powers_of_two(exponents).tolist() == [math.ldexp(1.0, int(e) - 127) for e in exponents]


def test_slabs_cover_everything_once(monkeypatch):
    monkeypatch.setattr(_arithmetic, "VALUES_AT_ONCE", 100)
    for count, width, multiple in ((7, 30, 1), (96, 40, 32), (1, 1000, 1), (33, 3, 32)):
        ranges = list(_arithmetic.slabs(count, width, multiple))
        assert [row for begin, end in ranges for row in range(begin, end)] == list(range(count))
        assert all(begin % multiple == 0 for begin, _ in ranges)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_weight_in_many_pieces_is_the_same(name, model, monkeypatch):
    whole = decoded(open_checkpoint(model(name).folder)).read(f"{UP}.weight")
    monkeypatch.setattr(_arithmetic, "VALUES_AT_ONCE", 500)
    assert torch.equal(decoded(open_checkpoint(model(name).folder)).read(f"{UP}.weight"), whole)


PACKED = [name for name, variant in VARIANTS.items() if variant.config.get("format") == "pack-quantized"]


@pytest.mark.parametrize("name", PACKED)
def test_compressed_tensors_own_decoder_agrees_on_packed_integers(name, model):
    arguments = VARIANTS[name].config["config_groups"]["group_0"]["weights"]
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    parts = stored_parts(model(name))
    parts["weight_scale"] = parts["weight_scale"].float()  # its product has the dtype of the scales
    theirs = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    assert torch.equal(open_original(model(name).folder).read(f"{UP}.weight"), theirs)


def test_compressed_tensors_own_decoder_agrees_on_nvfp4(model):
    """It computes in bfloat16: a scale rounded to 8 bits, and their product once more, each by 2 ** -9 at most."""
    name = "compressed-tensors nvfp4"
    scheme = QuantizationScheme(
        targets=["Linear"], weights=VARIANTS[name].config["config_groups"]["group_0"]["weights"]
    )
    theirs = NVFP4PackedCompressor.decompress(stored_parts(model(name)), scheme)["weight"].float()
    ours = open_original(model(name).folder).read(f"{UP}.weight")
    assert float(((ours - theirs).abs() / ours.abs().clamp(min=1e-9)).max()) < 2.1 * 2**-8
    assert bool((ours != 0).any())


def test_transformers_own_decoder_agrees_on_fp8(model):
    parts = stored_parts(model("fp8 blocks"))
    theirs = Fp8Dequantize(None)._dequantize_one(parts["weight"], parts["weight_scale_inv"], torch.float32)
    assert torch.equal(open_original(model("fp8 blocks").folder).read(f"{UP}.weight"), theirs)


def test_transformers_own_decoder_agrees_on_mxfp4(tmp_path):
    tensors = write_mxfp4(tmp_path)
    checkpoint = decoded(open_checkpoint(tmp_path))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    theirs = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32)
    found = checkpoint.read(name)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.float(), theirs)
    assert checkpoint.info(name).shape == tuple(theirs.shape) == (3, 64, 40)
    assert checkpoint.names() == [name, f"{name}_bias"]
    with pytest.raises(UserError, match="gpt_oss"):
        open_original(tmp_path)


def test_mxfp4_refuses_what_is_no_number_and_other_shapes(tmp_path):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    for folder, part, value, says in (
        ("nan", "_scales", torch.full((3, 40, 2), 255, dtype=torch.uint8), "240 are 255"),
        ("shape", "_scales", torch.zeros(3, 40, 3, dtype=torch.uint8), "must be U8 (3, 40, 2)"),
        ("narrow", "_blocks", torch.zeros(3, 40, 2, 8, dtype=torch.uint8), "(experts, outputs, groups, 16)"),
    ):
        tensors = {**write_mxfp4(tmp_path / folder), f"{name}{part}": value}
        save_file(tensors, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(BadFileError) as caught:
            decoded(open_checkpoint(tmp_path / folder)).read(name)
        assert says in str(caught.value)


def set_to(part: str, value: object):
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.{part}"].view(-1)[5] = value

    return edit


VALUES = {
    "v1 zero point of ones": ("gptq 4 bits", set_to("qzeros", -1), "zero points less one, from 0 to 14; 8 are 15"),
    "group out of range": ("gptq desc_act", set_to("g_idx", 2), "numbers of groups, from 0 to 1; it has 0 to 2"),
    "group below zero": ("gptq desc_act", set_to("g_idx", -1), "it has -1 to 1"),
    "order that desc_act denies": ("gptq 4 bits", set_to("g_idx", 1), "as desc_act is false"),
    "rows in another order": (
        "bitsandbytes int8", lambda tensors: tensors[f"{UP}.weight_format"].fill_(1), "weight_format' must be 0"
    ),
    "divisor zero": ("compressed-tensors nvfp4", lambda tensors: tensors[f"{UP}.weight_global_scale"].zero_(), "positive"),
    "power that is NaN": ("compressed-tensors mxfp4", set_to("weight_scale", 255), "1 are 255, NaN"),
}  # fmt: skip


def test_linears_that_dynamic_leaves_out_are_read_as_they_are(model, tmp_path):
    whole = model("gptq 4 bits")

    def leave_out(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{UP}.{part}"]
        tensors[f"{UP}.weight"] = torch.ones(96, 64, dtype=torch.bfloat16)

    found = open_original(change(whole, tmp_path / "model", leave_out, dynamic={"-:.*up_proj": {}}))
    assert foreign_weights(found).keys() == whole.values.keys() - {f"{UP}.weight"}
    assert torch.equal(found.read(f"{UP}.weight"), torch.ones(96, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize("writer", ["gptqmodel:0.8.7", "auto-round:0.16.1", ["autogptq", 3], None, {}])
def test_only_gptqmodels_word_is_taken_for_zero_points_that_borrow(writer, model, tmp_path):
    name = "gptq 4 bits by GPTQModel"
    folder = change(model(name), tmp_path / "model", meta={"quantizer": writer})
    with pytest.raises(BadFileError, match="zero points less one"):
        open_original(folder).read(f"{UP}.weight")


@pytest.mark.parametrize("what", VALUES)
def test_values_that_make_no_sense_are_refused(what, model, tmp_path):
    name, edit, says = VALUES[what]
    checkpoint = open_original(change(model(name), tmp_path / "model", edit))
    with pytest.raises(BadFileError) as caught:
        checkpoint.read(f"{UP}.weight")
    assert says in str(caught.value)
    assert UP in str(caught.value)


CONFIGS = {
    "other bits": ("gptq 4 bits", {"bits": 8}, "must be"),
    "more bits than there are": ("gptq 4 bits", {"bits": 5}, "bits 5; GPTQ knows 2 or 3 or 4 or 8"),
    "other groups": ("gptq 4 bits", {"group_size": 64}, "tensor 'model.layers.0.mlp.down_proj.scales' must be"),
    "groups of no size": ("gptq 4 bits", {"group_size": 0}, "-1 or a positive integer"),
    "bits that are no number": ("gptq 4 bits", {"bits": True}, "bits True"),
    "bits in words": ("gptq 4 bits", {"bits": "4"}, "bits '4'; GPTQ knows"),
    "desc_act that is no truth": ("gptq 4 bits", {"desc_act": "no"}, "must be true or false"),
    "another packing": ("gptq 4 bits", {"checkpoint_format": "marlin"}, "the packing 'marlin' in int32 of GPTQ is not read"),
    "other bits by module": ("gptq 4 bits", {"dynamic": {"+:x": {"bits": 8}}}, "'dynamic'"),
    "awq gemv": ("awq", {"version": "gemv"}, "version 'gemv' of AWQ is not read; version 'gemm' is"),
    "awq 8 bits": ("awq", {"bits": 8}, "AWQ knows 4"),
    "awq groups": ("awq", {"group_size": 16}, "must be F16 or BF16 or F32 (6, 64)"),
    "other blocks": ("fp8 blocks", {"weight_block_size": [16, 64]}, "weight_scale_inv' must be"),
    "blocks of no size": ("fp8 blocks", {"weight_block_size": [0, 64]}, "must be two positive integers"),
    "no blocks": ("fp8 blocks", {"weight_block_size": None}, "weight_scale_inv' must be"),
    "fp4 that is nf4": ("bitsandbytes nf4", {"bnb_4bit_quant_type": "fp4"}, "of the type fp4 that config.json names"),
    "neither 4 nor 8 bits": ("bitsandbytes nf4", {"load_in_4bit": False}, "either load_in_4bit or load_in_8bit"),
    "a rotation": ("compressed-tensors int4", {"transform_config": {"config_groups": {"x": {}}}}, "'transform_config'"),
    "sparse": ("compressed-tensors int4", {"sparsity_config": {"format": "sparse-24"}}, "'sparsity_config'"),
    "no groups": ("compressed-tensors int4", {"config_groups": None}, "no usable config_groups"),
    "no targets": ("compressed-tensors int4", {"config_groups": {"group_0": {}}}, "without a list of targets"),
    "others' targets": (
        "compressed-tensors int4", {"config_groups": {"group_0": {"targets": ["re:(", "lm_head"], "weights": {}}}}, "covers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CONFIGS)
def test_configurations_that_the_weights_contradict_are_refused(what, model, tmp_path):
    name, config, says = CONFIGS[what]
    with pytest.raises(UserError) as caught:
        open_original(change(model(name), tmp_path / "model", **config))
    assert says in str(caught.value)


def with_scheme(**arguments):
    config = json.loads(json.dumps(VARIANTS["compressed-tensors int4"].config))
    config["config_groups"]["group_0"]["weights"] |= arguments
    return config


@pytest.mark.parametrize("arguments", [
    {"num_bits": 8}, {"num_bits": 9}, {"num_bits": "4"}, {"type": "float"}, {"type": "complex"}, {"group_size": 16},
    {"group_size": None}, {"strategy": "channel"}, {"strategy": "block"}, {"strategy": "token"}, {"symmetric": False},
])  # fmt: skip
def test_a_scheme_that_the_parts_contradict_is_refused(arguments, model, tmp_path):
    folder = change(model("compressed-tensors int4"), tmp_path / "model", **with_scheme(**arguments))
    with pytest.raises(BadFileError):
        open_original(folder)


def test_a_zero_point_beside_a_symmetric_scheme_must_be_zero(model, tmp_path):
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.weight_zero_point"] = torch.zeros_like(tensors[f"{UP}.weight_scale"]).to(torch.int8)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        add(tensors)
        tensors[f"{UP}.weight_zero_point"][3] = 1

    name = "compressed-tensors int8"
    plain = open_original(model(name).folder).read(f"{UP}.weight")
    assert torch.equal(open_original(change(model(name), tmp_path / "zero", add)).read(f"{UP}.weight"), plain)
    with pytest.raises(BadFileError, match="zero throughout"):
        open_original(change(model(name), tmp_path / "other", spoil)).read(f"{UP}.weight")


def state_of(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in tensors if name.startswith(f"{UP}.weight.quant_state"))


STATES = {
    "no JSON": (lambda said: "{", "not JSON"),
    "another shape": (lambda said: {**said, "shape": [64, 64]}, "2048 bytes, for a weight (64, 64)"),
    "a huge shape": (lambda said: {**said, "shape": [2**30, 2**30]}, "bytes, for a weight"),
    "a shape of one size": (lambda said: {**said, "shape": [6144]}, "with shape, blocksize"),
    "other blocks": (lambda said: {**said, "blocksize": 32}, "absmax' must be"),
    "odd blocks": (lambda said: {**said, "blocksize": 63}, "with shape, blocksize"),
    "another type": (lambda said: {**said, "quant_type": "fp4"}, "of quant_type nf4; it says fp4"),
    "nested": (lambda said: {**said, "nested_blocksize": 256}, "absmax' must be U8"),
    "long": (lambda said: {**said, "more": "x" * 5000}, "at most 4096 bytes"),
    "an offset that is none": (lambda said: {**said, "nested_offset": "x"}, "with shape, blocksize"),
}


@pytest.mark.parametrize("what", STATES)
def test_states_of_bitsandbytes_are_read_with_suspicion(what, model, tmp_path):
    edit, says = STATES[what]

    def write(tensors: dict[str, torch.Tensor]) -> None:
        name = state_of(tensors)
        said = edit(json.loads(bytes(tensors[name].tolist())))
        raw = said if isinstance(said, str) else json.dumps(said)
        tensors[name] = torch.tensor(list(raw.encode()), dtype=torch.uint8)

    with pytest.raises(BadFileError) as caught:
        open_original(change(model("bitsandbytes nf4"), tmp_path / "model", write))
    assert says in str(caught.value)


def test_bits_left_over_by_odd_sizes_and_last_blocks(tmp_path):
    """A weight of 5 x 13 numbers in blocks of 16, the last of one number."""
    from foreign_models import bnb4

    parts, value = bnb4("nf4", nested=False, block=16).pack((5, 13), np.random.default_rng(0))
    save_file({f"x.{name}": part for name, part in parts.items()}, tmp_path / "model.safetensors")
    config = {"model_type": "x", "num_hidden_layers": 1, "quantization_config": bnb4("nf4", False).config}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = decoded(open_checkpoint(tmp_path))
    assert torch.equal(checkpoint.read("x.weight"), value.float())
    assert foreign_weights(checkpoint)["x.weight"].shape == (5, 13)


def test_a_weight_beside_its_codes_is_refused(model, tmp_path):
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.weight"] = torch.zeros(96, 64)

    with pytest.raises(BadFileError, match="more than once"):
        open_original(change(model("gptq 4 bits"), tmp_path / "model", add))


def test_biases_of_zeros_where_the_model_has_none_are_left_out(tmp_path):
    plain = write_foreign(tmp_path / "plain", VARIANTS["gptq 4 bits"], "llama", attention_bias=False)

    def bias(value: float):
        def add(tensors: dict[str, torch.Tensor]) -> None:
            tensors[f"{UP}.bias"] = torch.full((96,), value, dtype=torch.float16)

        return add

    found = open_original(change(plain, tmp_path / "zeros", bias(0.0)))
    assert found.names() == open_original(plain.folder).names()
    assert found.parameters == open_original(plain.folder).parameters
    with pytest.raises(BadFileError, match=r"up_proj\.bias' is not part of such a model"):
        open_original(change(plain, tmp_path / "ones", bias(1.0)))


def test_a_g_idx_of_minus_one_is_the_plain_order(model, tmp_path):
    def order(values: torch.Tensor):
        def add(tensors: dict[str, torch.Tensor]) -> None:
            tensors[f"{UP}.weight_g_idx"] = values.to(torch.int32)

        return add

    name, plain = "compressed-tensors int4", torch.arange(64) // 32
    expected = open_original(model(name).folder).read(f"{UP}.weight")
    for number, values in enumerate((plain, torch.full((64,), -1))):
        found = open_original(change(model(name), tmp_path / str(number), order(values)))
        assert torch.equal(found.read(f"{UP}.weight"), expected)
    turned = open_original(change(model(name), tmp_path / "turned", order(plain.flip(0))))
    assert not torch.equal(turned.read(f"{UP}.weight"), expected)
    with pytest.raises(BadFileError, match="it has 0 to 2"):
        open_original(change(model(name), tmp_path / "bad", order(torch.arange(64) // 25))).read(f"{UP}.weight")


GOLDEN = json.loads((Path(__file__).resolve().parents[2] / "golden/bitsandbytes.json").read_text("utf-8"))


def from_hex(dtype: str, shape: list[int], raw: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(raw), dtype=getattr(torch, dtype)).view(shape)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_what_bitsandbytes_itself_wrote_becomes_what_it_reads(kind, tmp_path):
    """``quantize_4bit`` and ``dequantize_4bit`` of bitsandbytes 0.50.2 on a CPU; NF4 with double quantization.

    Rows are whole blocks: its kernel for CPUs loses itself in others, by its own round trip.
    """
    golden = GOLDEN[kind]
    save_file({f"x.{name}": from_hex(*part) for name, part in golden["parts"].items()}, tmp_path / "model.safetensors")
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    config = {"model_type": "x", "num_hidden_layers": 1, "quantization_config": said}
    (tmp_path / "config.json").write_text(json.dumps(config))
    values = from_hex("float32", golden["shape"], golden["values"])
    assert torch.equal(decoded(open_checkpoint(tmp_path)).read("x.weight"), values)
    assert bool((values != 0).any())
