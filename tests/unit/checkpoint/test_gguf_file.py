"""GGUF as input: the model that comes out is the model that went in."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from bad_files import corpus
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quern.architectures.base import architecture_of
from quern.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quern.checkpoint.gguf import file as gguf_file
from quern.checkpoint.gguf.file import restore_row_order
from quern.checkpoint.gguf.header import GgufArray, read_gguf_header
from quern.core.errors import BadFileError, UserError

Kind = gguf.GGMLQuantizationType
KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
IDS = torch.tensor([[1, 5, 17, 40, 95, 0, 3, 64]])


def original(model_type: str, tied: bool) -> torch.nn.Module:
    """A random small model of transformers' own class, with biases and norms that are not their initial ones."""
    torch.manual_seed(3)
    config = {**corpus.CONFIG, "model_type": model_type, "tie_word_embeddings": tied}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def rebuilt(checkpoint: Checkpoint) -> torch.nn.Module:
    """The model that transformers makes of a checkpoint's configuration and tensors."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**checkpoint.config)).eval()
    state = {name: checkpoint.read(name, finite=True).float() for name in checkpoint.names()}
    if checkpoint.config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model


def stored_tensors(model: torch.nn.Module, tied: bool) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_gives_the_same_logits(family, tied, tmp_path):
    model = original(family, tied)
    tensors = stored_tensors(model, tied)
    name = "general.name"
    path = corpus.write_gguf(
        tmp_path / "model.gguf",
        tensors,
        {**corpus.CONFIG, "model_type": family},
        extra=lambda writer: writer.add_string(name, f"Some {family.title()} 7B"),
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.model_type == family
    assert set(checkpoint.names()) == set(tensors)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())
    assert torch.equal(logits(rebuilt(checkpoint)), logits(model))
    assert checkpoint.parameters == sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_type_gives_the_logits_of_the_values_it_stores(family, kind, tmp_path):
    """Quantization commutes with the order of rows, so the expected weights need no reordering."""
    model = original(family, tied=False)
    config = {**corpus.CONFIG, "model_type": family}
    path = corpus.write_gguf(tmp_path / "model.gguf", model.state_dict(), config, kind)
    result = logits(rebuilt(open_checkpoint(path)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                stored = gguf.quants.quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(stored, kind).copy()))
    assert torch.equal(result, logits(model))


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_agrees_with_transformers_own_reader(family, kind, tmp_path):
    model = original(family, tied=True)
    config = {**corpus.CONFIG, "model_type": family}
    path = corpus.write_gguf(tmp_path / "model.gguf", stored_tensors(model, tied=True), config, kind)
    theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=path.name, dtype=torch.float32)
    assert torch.equal(logits(rebuilt(open_checkpoint(path))), logits(theirs))


def test_dtypes_are_kept_or_float32(tmp_path):
    for kind, name in zip(KINDS, ["F32", "F16", "BF16", "F32", "F32"], strict=True):
        checkpoint = open_checkpoint(
            corpus.write_gguf(tmp_path / f"{kind.name}.gguf", corpus.weights(), corpus.CONFIG, kind)
        )
        info = checkpoint.info("model.layers.1.mlp.down_proj.weight")
        assert (info.dtype, info.shape) == (name, (corpus.HIDDEN, corpus.INTERMEDIATE))
        assert info.stored_bytes == info.elements * gguf.GGML_QUANT_SIZES[kind][1] / gguf.GGML_QUANT_SIZES[kind][0]


def test_pieces_of_any_size_give_the_same_values(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(corpus.good_gguf(tmp_path / "model.gguf"))
    whole = checkpoint.read("lm_head.weight")
    for size in (1, corpus.HIDDEN * 7, corpus.HIDDEN * corpus.VOCABULARY):
        monkeypatch.setattr(gguf_file, "_VALUES_AT_ONCE", size)
        assert torch.equal(checkpoint.read("lm_head.weight"), whole)


def test_row_order_is_undone():
    rows = torch.arange(12.0).view(12, 1).expand(12, 3)
    stored = torch.from_numpy(corpus.interleave(rows.numpy(), 2))
    assert stored[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(restore_row_order(stored, 2), rows)
    assert torch.equal(restore_row_order(stored[:, 0], 2), rows[:, 0])


def test_config_says_what_the_file_says(tmp_path):
    config = open_checkpoint(corpus.good_gguf(tmp_path / "model.gguf")).config
    assert {**config, **corpus.CONFIG} == config
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


def test_bf16_bytes_are_the_metadata_and_two_bytes_a_weight(tmp_path):
    path = corpus.write_gguf(tmp_path / "model.gguf", corpus.weights(), corpus.CONFIG)
    checkpoint = open_checkpoint(path)
    assert checkpoint.files == (path,)
    assert checkpoint.bf16_bytes == path.stat().st_size - 2 * checkpoint.parameters
    assert len(checkpoint.sha256()) == 64


def llama3_factors(scaling: dict[str, float]) -> np.ndarray:
    """What llama.cpp stores, from transformers' own code: unscaled over scaled frequencies."""
    size = corpus.CONFIG["head_dim"]
    settings = {**corpus.CONFIG, "max_position_embeddings": 1 << 17, "rope_scaling": {"rope_type": "llama3", **scaling}}
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.for_model(**settings), "cpu")
    plain = corpus.CONFIG["rope_theta"] ** -(torch.arange(0, size, 2) / size)
    return (plain / frequencies).numpy().astype(np.float32)


@pytest.mark.parametrize("factor", [1.0, 8.0, 32.0])
def test_llama_3s_rotary_scaling_is_found_again(factor, tmp_path):
    scaling = {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = llama3_factors(scaling)
    path = corpus.write_gguf(
        tmp_path / "model.gguf",
        corpus.weights(),
        {**corpus.CONFIG, "max_position_embeddings": 1 << 17},
        extra=lambda writer: writer.add_tensor("rope_freqs.weight", factors),
    )
    assert open_checkpoint(path).config["rope_scaling"] == {"rope_type": "llama3", **scaling}


def test_any_other_factors_divide_the_frequencies_exactly(tmp_path):
    """llama.cpp divides each frequency by its factor, whatever it is; the constants here are none of Llama 3's."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0, "original_max_position_embeddings": 32}
    factors = llama3_factors(scaling)
    assert 1 < factors[-2] != factors[-1]
    path = corpus.write_gguf(
        tmp_path / "model.gguf",
        corpus.weights(),
        corpus.CONFIG,
        extra=lambda writer: writer.add_tensor("rope_freqs.weight", factors),
    )
    rotary = architecture_of(open_checkpoint(path).config).build_rotary()
    plain = corpus.CONFIG["rope_theta"] ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    assert torch.allclose(rotary.inv_freq.double(), plain / torch.from_numpy(factors).double(), rtol=1e-6, atol=0)
    assert rotary.attention_scaling == 1
    far = rotary(torch.zeros(1, 1, 16), torch.tensor([[299]]))[0][0, 0, :8].double()  # beyond the context too
    # Float32 angles of up to 299 are off by 299 x 2^-24 = 2e-5.
    assert torch.allclose(far, (299 * plain / torch.from_numpy(factors).double()).cos(), rtol=0, atol=1e-4)


def test_linear_and_yarn_scaling(tmp_path):
    def linear(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.5)

    def yarn(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    def longrope(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)

    def config(name, extra):
        return open_checkpoint(corpus.write_gguf(tmp_path / name, corpus.weights(), corpus.CONFIG, extra=extra)).config

    assert config("linear.gguf", linear)["rope_scaling"] == {"rope_type": "linear", "factor": 2.5}
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert config("yarn.gguf", yarn)["rope_scaling"] == expected
    with pytest.raises(UserError, match="'longrope'; none, linear, yarn"):
        config("long.gguf", longrope)


def test_header_agrees_with_the_gguf_package(tmp_path):
    path = corpus.good_gguf(tmp_path / "model.gguf")
    ours, theirs = read_gguf_header(path), gguf.GGUFReader(path)
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert (mine.kind, mine.begin, mine.end - mine.begin) == (
            tensor.tensor_type,
            tensor.data_offset,
            tensor.n_bytes,
        )
    assert len(ours.tensors) == len(theirs.tensors)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            contents, value = field.contents(), ours.metadata[key]
            assert value.count == len(contents) if isinstance(value, GgufArray) else value == contents


def test_a_type_without_a_decoder_is_refused(tmp_path):
    path = corpus.good_gguf(tmp_path / "model.gguf")
    raw = bytearray(path.read_bytes())
    at = raw.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    raw[at : at + 4] = int(Kind.I8).to_bytes(4, "little")
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"'model\.norm\.weight' has type I8, which cannot be decoded"):
        open_checkpoint(path)


def test_a_file_cut_after_opening_is_refused(tmp_path):
    path = corpus.good_gguf(tmp_path / "model.gguf")
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(BadFileError, match="has changed since"):
        checkpoint.read("model.layers.1.mlp.down_proj.weight")
