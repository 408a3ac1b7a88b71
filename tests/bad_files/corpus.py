"""Malformed checkpoints, each made from a good one by the one change that its name says.

``CASES`` and those of ``gguf_cases.py`` are what the tests run over.
``good_folder`` and ``good_gguf`` make the originals, which must open.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY = 64, 96, 2, 4, 2, 96
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "head_dim": HIDDEN // HEADS,
    "tie_word_embeddings": False,
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def expected_shapes(config: dict[str, Any] = CONFIG) -> dict[str, tuple[int, ...]]:
    """The tensors that a llama of this configuration has."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        block = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Random weights of ``CONFIG``."""
    generator = torch.Generator().manual_seed(2)
    return {
        name: (torch.randn(shape, generator=generator) * 0.1).to(dtype) for name, shape in expected_shapes().items()
    }


def write_tokenizer(folder: Path, tokens: int = VOCABULARY) -> None:
    """A tokenizer of ``tokens`` single characters."""
    vocabulary = {chr(32 + index): index for index in range(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "!"}')


def good_folder(folder: Path) -> Path:
    """A whole checkpoint in one safetensors file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights(), folder / SINGLE, {"format": "pt"})
    write_tokenizer(folder)
    return folder


def sharded_folder(folder: Path) -> Path:
    """The same checkpoint in two shards with an index."""
    good_folder(folder)
    (folder / SINGLE).unlink()
    tensors = weights()
    places = {name: SHARDS[index % 2] for index, name in enumerate(tensors)}
    for shard in SHARDS:
        save_file({name: tensors[name] for name in tensors if places[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


GGUF_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """What llama.cpp calls one of transformers' tensors."""
    outside = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in outside or name == "lm_head.weight":
        return outside.get(name, "output.weight")
    _, _, layer, *middle, kind = name.split(".")
    return f"blk.{layer}.{GGUF_BLOCK['.'.join(middle)]}.{kind}"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of a Llama's q and k, written from its description: halves become neighbours."""
    size = weight.shape[0] // heads
    order = [
        head * size + half * size // 2 + pair for head in range(heads) for pair in range(size // 2) for half in (0, 1)
    ]
    return weight[order]


def write_gguf(
    path: Path,
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any],
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """A GGUF of ``tensors`` (transformers' names), its matrices stored as ``kind``; ``extra`` adds what it likes."""
    architecture = "llama" if config["model_type"] == "mistral" else config["model_type"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(33 + index) for index in range(config["vocab_size"] - 2)), "AB", "ABC"])
    writer.add_token_merges(["A B", "AB C"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    extra(writer)
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if architecture == "llama" and ".q_proj." in name:
            values = interleave(values, config["num_attention_heads"])
        if architecture == "llama" and ".k_proj." in name:
            values = interleave(values, config["num_key_value_heads"])
        stored = kind if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(values, stored)
        writer.add_tensor(gguf_name(name), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def good_gguf(path: Path) -> Path:
    """A whole llama in Q8_0."""
    return write_gguf(path, weights(), CONFIG, gguf.GGMLQuantizationType.Q8_0)


@dataclass(frozen=True)
class Case:
    """A malformed checkpoint: ``build(folder)`` makes it in an empty folder and returns MODEL."""

    name: str
    build: Callable[[Path], Path]
    names: str
    """What the message must mention: the file at fault."""
    says: str
    """A few words of the problem, so that the right check is the one that fires."""


CASES: list[Case] = []


def case(name: str, names: str, says: str) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    """Register a builder."""

    def register(build: Callable[[Path], Path]) -> Callable[[Path], Path]:
        CASES.append(Case(name, build, names, says))
        return build

    return register


# ---- safetensors: a good folder whose model.safetensors gets another header or other bytes


def header_of(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file's bytes."""
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(header: bytes, data: bytes) -> bytes:
    """A safetensors file's bytes."""
    return len(header).to_bytes(8, "little") + header + data


def rewrite(
    name: str, says: str, names: str = SINGLE
) -> Callable[[Callable[[bytes], bytes]], Callable[[bytes], bytes]]:
    """Register a case that replaces the bytes of model.safetensors."""

    def register(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
        def build(folder: Path) -> Path:
            path = good_folder(folder / "model") / SINGLE
            path.write_bytes(change(path.read_bytes()))
            return path.parent

        CASES.append(Case(name, build, names, says))
        return change

    return register


def edit(
    name: str, says: str, names: str = SINGLE
) -> Callable[[Callable[[dict[str, Any]], object]], Callable[[dict[str, Any]], object]]:
    """Register a case that edits the header of model.safetensors in place; the data stays."""

    def register(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
        def replace(raw: bytes) -> bytes:
            header, data = header_of(raw)
            change(header)
            return with_header(json.dumps(header).encode(), data)

        rewrite(name, says, names)(replace)
        return change

    return register


NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"

rewrite("an empty file", "too short")(lambda raw: b"")
rewrite("seven bytes", "too short")(lambda raw: raw[:7])
rewrite("header length 0", "empty header")(lambda raw: bytes(8) + raw[8:])
rewrite("header length beyond the file", "bytes in all")(lambda raw: len(raw).to_bytes(8, "little") + raw[8:])
rewrite("header length 2^63", "are allowed")(lambda raw: (1 << 63).to_bytes(8, "little") + raw[8:])
rewrite("header length 2^64 - 1", "are allowed")(lambda raw: b"\xff" * 8 + raw[8:])
rewrite("header that is no JSON", "not JSON")(lambda raw: raw[:8] + b"[" + raw[9:])
rewrite("header that is a list", "not a JSON object")(lambda raw: with_header(b"[1, 2]", b""))
rewrite("header that is not UTF-8", "not UTF-8")(lambda raw: with_header(b'{"\xff\xfe": 1}', b""))
rewrite("header nested too deeply", "nested too deeply")(lambda raw: with_header(b'{"a":' * 50_000, b""))
rewrite("header with NaN", "NaN")(lambda raw: with_header(b'{"a": NaN}', b""))
rewrite("number of 5000 digits", "not JSON")(lambda raw: with_header(b'{"a": ' + b"9" * 5000 + b"}", b""))
rewrite("no tensors", "no tensors", "model")(lambda raw: with_header(b"{}", b""))
rewrite("a truncated file", "ends at byte")(lambda raw: raw[:-100])
rewrite("bytes after the last tensor", "belong to no tensor")(lambda raw: raw + bytes(16))
edit("metadata that is a list", "__metadata__")(lambda header: header.update(__metadata__=["pt"]))
edit("metadata with a number", "__metadata__")(lambda header: header.update(__metadata__={"format": 1}))
edit("entry that is a number", "exactly dtype")(lambda header: header.update({NORM: 3}))
edit("entry without a dtype", "exactly dtype")(lambda header: header[NORM].pop("dtype"))
edit("entry with an extra key", "exactly dtype")(lambda header: header[NORM].update(byte_order="big"))
edit("unknown dtype", "has dtype")(lambda header: header[NORM].update(dtype="F128"))
edit("dtype that is a list", "has dtype")(lambda header: header[NORM].update(dtype=["BF16"]))
edit("dtype of another size", "offsets span")(lambda header: header[NORM].update(dtype="F32"))
edit("dtype of integers", "has dtype I16", NORM)(lambda header: header[NORM].update(dtype="I16"))
edit("negative dimension", "non-negative integers")(lambda header: header[NORM].update(shape=[-HIDDEN]))
edit("fractional dimension", "non-negative integers")(lambda header: header[NORM].update(shape=[64.0]))
edit("dimension that is true", "non-negative integers")(lambda header: header[NORM].update(shape=[True, HIDDEN]))
edit("shape that is a number", "non-negative integers")(lambda header: header[NORM].update(shape=HIDDEN))
edit("more elements than 64 bits", "63 bits")(lambda header: header[NORM].update(shape=[1 << 40, 1 << 40]))
edit("product that wraps to the right size", "63 bits")(lambda header: header[NORM].update(shape=[1 << 58, HIDDEN]))
edit("empty but endless shape", "63 bits")(lambda header: header[NORM].update(shape=[0, 1 << 62, 1 << 62]))
edit("a thousand dimensions", "dimensions")(lambda header: header[NORM].update(shape=[1] * 1000))
edit("three offsets", "data_offsets")(lambda header: header[NORM]["data_offsets"].append(0))
edit("negative offset", "data_offsets")(lambda header: header[NORM].update(data_offsets=[-128, 0]))
edit("offsets reversed", "before it begins")(lambda header: header[NORM]["data_offsets"].reverse())
edit("offsets beyond the file", "ends at byte")(
    lambda header: header[NORM].update(data_offsets=[1 << 50, (1 << 50) + 128])
)
edit("overlapping tensors", "overlaps")(lambda header: header[NORM].update(data_offsets=[0, 2 * HIDDEN]))
edit("a gap", "gap")(lambda header: header.pop("model.layers.0.self_attn.q_proj.weight"))
edit("a tensor less than the config has", "is missing", "mlp.up_proj.weight")(
    lambda header: header.update({"other.weight": header.pop("model.layers.1.mlp.up_proj.weight")})
)
edit("a tensor that the config has not", "not part of", "model.norm.bias")(
    lambda header: header.update({"model.norm.bias": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})
)
edit("a tensor of another shape", "has shape", EMBEDDING)(
    lambda header: header[EMBEDDING].update(shape=[HIDDEN, VOCABULARY])
)


@rewrite("a name given twice", "twice")
def _twice(raw: bytes) -> bytes:
    header, data = header_of(raw)
    text = json.dumps(header).encode()
    return with_header(text[:-1] + b', "' + NORM.encode() + b'": ' + json.dumps(header[NORM]).encode() + b"}", data)


def _with_value(value: float) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        model = good_folder(folder / "model")
        tensors = weights()
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
        save_file(tensors, model / SINGLE)
        return model

    return build


CASES.append(Case("a weight that is NaN", _with_value(float("nan")), SINGLE, "1 NaN or infinite"))
CASES.append(Case("a weight that is infinite", _with_value(float("-inf")), SINGLE, "1 NaN or infinite"))


# ---- shards and index


def _index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        path = sharded_folder(folder / "model") / INDEX
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
        return path.parent

    return build


def _place_norm(shard: object) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["weight_map"].update({NORM: shard})


for _name, _change, _says in (
    ("index without a weight map", lambda data: data.pop("weight_map"), "no weight_map"),
    ("index with a number for a shard", _place_norm(1), "no weight_map"),
    ("index pointing to the parent", _place_norm("../model.safetensors"), "only plain"),
    ("index pointing to the root", _place_norm("/etc/model.safetensors"), "only plain"),
    ("index pointing into a folder", _place_norm("a\\b.safetensors"), "only plain"),
    ("index pointing to a pickle", _place_norm("pytorch_model.bin"), "only plain"),
    ("index with a zero byte", _place_norm("a\0.safetensors"), "only plain"),
    ("index naming a missing shard", _place_norm("model-00003-of-00003.safetensors"), "missing"),
    ("index leaving a tensor out", lambda data: data["weight_map"].pop(NORM), "does not place"),
    ("index swapping two shards", _place_norm(SHARDS[0]), ""),
):
    CASES.append(Case(_name, _index(_change), INDEX if _says else "safetensors", _says))


@case("a truncated shard", SHARDS[1], "ends at byte")
def _truncated_shard(folder: Path) -> Path:
    model = sharded_folder(folder / "model")
    (model / SHARDS[1]).write_bytes((model / SHARDS[1]).read_bytes()[:-10])
    return model


@case("a shard that is a pipe", SHARDS[0], "not a regular file")
def _pipe(folder: Path) -> Path:
    model = sharded_folder(folder / "model")
    (model / SHARDS[0]).unlink()
    os.mkfifo(model / SHARDS[0])
    return model


# ---- the folder as a whole


def _config(text: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        model = good_folder(folder / "model")
        (model / "config.json").write_text(text)
        return model

    return build


def _other_config(**changes: Any) -> Callable[[Path], Path]:
    return _config(json.dumps({**CONFIG, **changes}))


CASES += [
    Case("config that is no JSON", _config("{"), "config.json", "not JSON"),
    Case("config that is a list", _config("[]"), "config.json", "not a JSON object"),
    Case("config of 17 MB", _config('{"a": "' + "b" * (17 << 20) + '"}'), "config.json", "more than"),
    Case("config without model_type", _config("{}"), "config.json", "model_type"),
    Case("config with a number for model_type", _config('{"model_type": 1}'), "config.json", "model_type"),
    Case("config with a layer more", _other_config(num_hidden_layers=3), "model", "layers.2.input_layernorm"),
    Case("config with a layer less", _other_config(num_hidden_layers=1), "model", "the weights have 2 layers"),
    Case("config with another width", _other_config(hidden_size=128), "model", "has shape"),
    Case("already quantized", _other_config(quantization_config={"quant_method": "hqq"}), "model", "already quantized"),
    Case(
        "gptq without its weights",
        _other_config(quantization_config={"quant_method": "gptq"}),
        "model",
        "no weight is packed as GPTQ does",
    ),
]


@case("an empty folder", "empty", "holds no config.json")
def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


@case("a folder without weights", "model", "holds neither")
def _no_weights(folder: Path) -> Path:
    model = good_folder(folder / "model")
    (model / SINGLE).unlink()
    return model


@case("a folder with a pickle only", "pytorch_model.bin", "pickle")
def _pickle_only(folder: Path) -> Path:
    model = _no_weights(folder)
    torch.save(weights(), model / "pytorch_model.bin")
    return model


@case("a pickle as MODEL", "pytorch_model.bin", "pickle")
def _pickle(folder: Path) -> Path:
    return _pickle_only(folder) / "pytorch_model.bin"


@case("a safetensors file as MODEL", SINGLE, "is one file of a model")
def _single_file(folder: Path) -> Path:
    return good_folder(folder / "model") / SINGLE


@case("a path that does not exist", "nothing", "does not exist")
def _missing(folder: Path) -> Path:
    return folder / "nothing"


@case("a missing tokenizer", "model", "no tokenizer")
def _no_tokenizer(folder: Path) -> Path:
    model = good_folder(folder / "model")
    (model / "tokenizer.json").unlink()
    return model


@case("a tokenizer that is no JSON", "tokenizer.json", "not JSON")
def _broken_tokenizer(folder: Path) -> Path:
    model = good_folder(folder / "model")
    (model / "tokenizer.json").write_text("{{")
    return model


@case("a tokenizer of another kind of file", "model", "cannot be loaded")
def _strange_tokenizer(folder: Path) -> Path:
    model = good_folder(folder / "model")
    (model / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Magic"}}')
    return model


@case("a tokenizer that wants to run code", "model", "cannot be loaded")
def _code(folder: Path) -> Path:
    model = good_folder(folder / "model")
    (model / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}')
    (model / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")
    return model
