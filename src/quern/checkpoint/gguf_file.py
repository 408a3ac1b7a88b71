"""GGUF files as checkpoints: configuration, names and weights of the Llama, Mistral and Qwen families.

llama.cpp's converter (``convert_hf_to_gguf.py``) renames tensors, reorders the rows of Llama's q and k for its own
rotary embedding, and puts Llama 3's frequency scaling into a tensor; all three are undone here. Weights are dequantized
one tensor at a time, a few rows at a time, to float32 (float16 and bfloat16 stay as they are).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quern.checkpoint.files import InputFile
from quern.checkpoint.gguf_header import GgufArray, GgufHeader, GgufTensor, read_gguf_header
from quern.checkpoint.safetensors_file import DTYPES, TensorInfo, allocate_bytes
from quern.core.errors import BadFileError, UserError

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""``general.architecture`` to the class that transformers has for it. Mistral's files call themselves llama."""
_VALUES_AT_ONCE = 1 << 20
_OTHER = "Give another file of a whole model"

_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d{1,6})\.(\w+)\.(weight|bias)")
_ROPE_FREQUENCIES = "rope_freqs.weight"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Constants that all Llama 3 models share; a GGUF holds the resulting factors only."""


@dataclass(frozen=True)
class GgufSource:
    """The tensors of a GGUF file under transformers' names."""

    path: Path
    stored: Mapping[str, GgufTensor]
    infos: Mapping[str, TensorInfo]
    heads: Mapping[str, int]
    """Tensors whose rows are reordered, with their number of heads."""

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The file."""
        return (self.path,)

    def place(self, name: str) -> Path:
        """The file."""
        return self.path

    def read(self, name: str) -> torch.Tensor:
        """One tensor, dequantized, in fresh memory on the CPU."""
        tensor = _dequantized(self.path, self.stored[name], self.infos[name])
        return restore_row_order(tensor, self.heads[name]) if name in self.heads else tensor


def open_gguf(path: Path) -> tuple[dict[str, Any], GgufSource]:
    """The configuration (as ``config.json`` would say it) and the tensors of a GGUF file.

    Raises ``BadFileError`` for a malformed file, ``UserError`` for a model of another family.
    """
    header = read_gguf_header(path)
    config = _config(path, header)
    names = {_name(path, stored): stored for stored in header.tensors if stored != _ROPE_FREQUENCIES}
    stored = {name: header.tensors[gguf_name] for name, gguf_name in names.items()}
    infos = {
        name: TensorInfo(_read_dtype(path, name, tensor.kind), tensor.shape, tensor.begin, tensor.end)
        for name, tensor in stored.items()
    }
    return config, GgufSource(path, stored, infos, _reordered(path, config, infos))


def _name(path: Path, stored: str) -> str:
    """transformers' name of a tensor."""
    if stored in _OUTSIDE:
        return _OUTSIDE[stored]
    match = _BLOCK.fullmatch(stored)
    if match is None or match[2] not in _INSIDE:
        raise BadFileError(path, f"holds tensor {stored!r}, which these model families do not have", _OTHER)
    return f"model.layers.{int(match[1])}.{_INSIDE[match[2]]}.{match[3]}"


def _config(path: Path, header: GgufHeader) -> dict[str, Any]:
    metadata, tensors = header.metadata, header.tensors
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise UserError(f"{path} holds a {architecture!r} model; GGUF models that are read: {', '.join(FAMILIES)}")
    if metadata.get(f"{architecture}.expert_count", 0) != 0:
        raise UserError(f"{path} holds a mixture of experts; only dense models are read. Give another model")
    if "token_embd.weight" not in tensors:
        raise BadFileError(path, "holds no token_embd.weight", _OTHER)
    field = _fields(path, metadata, architecture)
    heads = field("attention.head_count", int)
    vocabulary = tensors["token_embd.weight"].shape[0]
    config = {
        "model_type": architecture,
        "architectures": [FAMILIES[architecture]],
        "hidden_size": field("embedding_length", int),
        "intermediate_size": field("feed_forward_length", int),
        "num_hidden_layers": field("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", int, heads),
        "max_position_embeddings": field("context_length", int),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon", float),
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_theta": field("rope.freq_base", float, 10000.0),
        "head_dim": field("attention.key_length", int, config_head_size(field("embedding_length", int), heads)),
    }
    if architecture in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if scaling := _rope_scaling(path, header, config, field):
        config["rope_scaling"] = scaling
    _name_mistral(config, metadata)
    _add_token_ids(path, config, metadata)
    return config


def config_head_size(hidden: int, heads: int) -> int:
    """Channels of one attention head where the file does not say; at least 1, so that nonsense fails later by name."""
    return max(hidden // heads, 1)


def _fields(path: Path, metadata: Mapping[str, Any], architecture: str) -> Callable[..., Any]:
    """A reader of the architecture's own metadata that checks type and sign; without a default, absence is an error."""

    def field(key: str, kind: type[int] | type[float], default: Any = None) -> Any:
        name = f"{architecture}.{key}"
        value: Any = metadata.get(name, default)
        if isinstance(value, float) and kind is float:
            # Files hold float32; the shortest text of it is what the model's authors wrote.
            value = float(str(np.float32(value)))
        if type(value) is not kind or not 0 < value < 2**31:
            what = f"{value.count} values" if isinstance(value, GgufArray) else repr(value)[:40]
            raise BadFileError(path, f"metadata {name!r} must be one positive {kind.__name__}, got {what}", _OTHER)
        return value

    return field


def _name_mistral(config: dict[str, Any], metadata: Mapping[str, Any]) -> None:
    """Call a Mistral by its name; it computes what a Llama does (llama.cpp drops the first version's window)."""
    if config["model_type"] == "llama" and "mistral" in str(metadata.get("general.name", "")).lower():
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
        del config["attention_bias"]


def _add_token_ids(path: Path, config: dict[str, Any], metadata: Mapping[str, Any]) -> None:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, GgufArray) and tokens.count > config["vocab_size"]:
        raise BadFileError(
            path, f"its tokenizer has {tokens.count} tokens, its embedding {config['vocab_size']}", _OTHER
        )
    for key in ("bos", "eos", "padding"):
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(value) is int and value < config["vocab_size"]:
            config[f"{'pad' if key == 'padding' else key}_token_id"] = value


def _rope_scaling(
    path: Path, header: GgufHeader, config: Mapping[str, Any], field: Callable[..., Any]
) -> dict[str, Any] | None:
    if _ROPE_FREQUENCIES in header.tensors:
        return _llama3_scaling(path, header.tensors[_ROPE_FREQUENCIES], config)
    kind = header.metadata.get(f"{header.metadata['general.architecture']}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": field("rope.scaling.factor", float)}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": field("rope.scaling.factor", float),
            "original_max_position_embeddings": field("rope.scaling.original_context_length", int),
        }
    raise UserError(
        f"{path} scales its rotary embedding by {str(kind)[:40]!r}; none, linear, yarn and Llama 3's are read"
    )


def _llama3_scaling(path: Path, tensor: GgufTensor, config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling, found again from the factors that divide the frequencies (arXiv:2407.21783, and the code of
    llama.cpp's converter). The largest factor is the scaling itself; the others must then follow.
    """
    half = config["head_dim"] // 2
    if tensor.shape != (half,):
        raise BadFileError(
            path, f"{_ROPE_FREQUENCIES} has shape {tensor.shape}, the head size calls for {(half,)}", _OTHER
        )
    factors = _dequantized(path, tensor, TensorInfo("F32", tensor.shape, tensor.begin, tensor.end)).double().numpy()
    factor = float(f"{factors.max():.6g}")  # float32 holds no more digits
    if not math.isfinite(factor) or factor < 1 or not np.allclose(factors, _llama3_factors(config, factor), rtol=1e-5):
        raise UserError(f"{path} scales its rotary embedding in a way other than Llama 3's, which is not read")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _llama3_factors(config: Mapping[str, Any], factor: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    half = config["head_dim"] // 2
    wavelengths = 2 * np.pi * config["rope_theta"] ** (np.arange(half) / half)
    low, high, context = _LLAMA3.values()
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth))


def _reordered(path: Path, config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> dict[str, int]:
    """The q and k tensors of a Llama or Mistral with their number of heads."""
    if config["model_type"] not in ("llama", "mistral"):
        return {}
    result: dict[str, int] = {}
    for name, info in infos.items():
        for part, key in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if f".{part}." in name:
                if info.shape[0] % (2 * config[key]):
                    raise BadFileError(
                        path, f"{name} has {info.shape[0]} rows, not pairs for {config[key]} heads", _OTHER
                    )
                result[name] = config[key]
    return result


def restore_row_order(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of the rows of q and k.

    transformers rotates row i of a head with row i + size/2; llama.cpp rotates neighbours, so its converter interleaves
    the halves. ``tensor``: ``(heads * size, ...)``.
    """
    return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _read_dtype(path: Path, name: str, kind: int) -> str:
    """What a tensor of this ggml type is read as. Raises ``UserError`` for a type without a decoder."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kinds = GGMLQuantizationType
    kept = {kinds.F16: "F16", kinds.BF16: "BF16", kinds.F32: "F32"}
    if kind in kept:
        return kept[kinds(kind)]
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kinds(kind)][1]), np.uint8), kinds(kind))
    except NotImplementedError:
        raise UserError(f"{path}: tensor {name!r} has type {kinds(kind).name}, which cannot be decoded here") from None
    return "F32"


def _dequantized(path: Path, tensor: GgufTensor, info: TensorInfo) -> torch.Tensor:
    """The values of a tensor in ``info``'s dtype; apart from the result, memory for a few rows only."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    dtype = DTYPES[info.dtype]
    result = allocate_bytes(path, info.elements * dtype.itemsize)
    kept = info.elements * dtype.itemsize == tensor.end - tensor.begin
    with InputFile(path) as file:
        if kept:
            file.fill(result.numpy().data, tensor.begin)
            return result.view(dtype).view(info.shape)
        values = result.view(dtype).view(-1, info.shape[-1])
        row_bytes = (tensor.end - tensor.begin) // values.shape[0]
        step = max(1, _VALUES_AT_ONCE // info.shape[-1])
        for row in range(0, values.shape[0], step):
            rows = min(step, values.shape[0] - row)
            raw = np.frombuffer(file.read(tensor.begin + row * row_bytes, rows * row_bytes), np.uint8)
            with np.errstate(all="ignore"):  # damaged scales give NaN, which whoever uses the weights checks for
                decoded = dequantize(raw.reshape(rows, row_bytes), GGMLQuantizationType(tensor.kind))
            values[row : row + rows] = torch.from_numpy(np.ascontiguousarray(decoded))
    return result.view(dtype).view(info.shape)
