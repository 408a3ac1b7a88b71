"""What a GGUF's metadata amounts to as a ``config.json``, for the Llama, Mistral, Mixtral and Qwen families.

llama.cpp's converter keeps most of a configuration as metadata, some of it only in which tensors there are (biases, a head
of its own), and Llama 3's frequency scaling as a tensor of factors. Whatever would change the result and has no place in
these families' configurations is refused, never dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quern.checkpoint.gguf.header import GgufArray, GgufHeader
from quern.checkpoint.gguf.names import FAMILIES, OTHER, ROPE_FREQUENCIES
from quern.core.errors import BadFileError, UserError

READ = tuple(dict.fromkeys(family.architecture for family in FAMILIES.values()))
"""What ``general.architecture`` may be. Mistral's and Mixtral's files call themselves llama."""
WINDOWED_LAYERS = ".attention.sliding_window_pattern"
"""End of the key under which a file says which layers have a window; an array of truth values."""

_FOREIGN = {
    "expert_weights_scale": 1, "expert_gating_func": 1, "expert_group_count": 0,
    "attention.scale": 0, "attention.clamp_kqv": 0, "attention.max_alibi_bias": 0, "logit_scale": 1,
    "embedding_scale": 1, "residual_scale": 1, "attn_logit_softcapping": 0, "final_logit_softcapping": 0,
    "attention.causal": True, "attention.temperature_scale": 0, "use_parallel_residual": False,
    "rope.scaling.yarn_log_multiplier": 0, "rope.scaling.yarn_ext_factor": 1,
}  # fmt: skip
"""Metadata that would change the result, with the value under which it does not."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Constants that all Llama 3 models share; a GGUF holds the resulting factors only."""

Field = Callable[..., Any]


def config_of(path: Path, header: GgufHeader, factors: NDArray[np.float64] | None) -> dict[str, Any]:
    """The configuration, as ``config.json`` would say it. ``factors``: what ``rope_freqs.weight`` holds.

    Raises ``BadFileError`` for metadata that makes no sense, ``UserError`` for a model of another family.
    """
    metadata, tensors = header.metadata, header.tensors
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in READ:
        raise UserError(
            f"{path} holds a {str(architecture)[:40]!r} model; GGUF models that are read: {', '.join(READ)}"
        )
    if "token_embd.weight" not in tensors:
        raise BadFileError(path, "holds no token_embd.weight", OTHER)
    _refuse_foreign(path, metadata, architecture)
    field = _fields(path, metadata, architecture)
    family = _family(path, metadata, architecture)
    heads = field("attention.head_count", int)
    vocabulary = tensors["token_embd.weight"].shape[0]
    config = {
        "model_type": family,
        "architectures": [FAMILIES[family].class_name],
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
    _check_head_sizes(path, config, field)
    _add_experts(path, config, metadata, field)
    if family in ("llama", "qwen3", "qwen3_moe"):
        config["attention_bias"] = _any_bias(header, "attn_")
    if family == "qwen2_moe":
        config["qkv_bias"] = _any_bias(header, "attn_")
    if family == "llama" and _any_bias(header, "ffn_"):
        config["mlp_bias"] = True
    if scaling := _rope_scaling(path, metadata, config, field, factors):
        config["rope_scaling"] = scaling
    _add_window(path, config, metadata, architecture)
    _name_mistral(config, metadata)
    _add_token_ids(path, config, metadata)
    return config


def _refuse_foreign(path: Path, metadata: Mapping[str, Any], architecture: str) -> None:
    for key, harmless in _FOREIGN.items():
        value = metadata.get(f"{architecture}.{key}", harmless)
        if value != harmless and (value != 0 or type(value) is bool):
            raise UserError(
                f"{path} says {architecture}.{key}: {str(value)[:40]}, which transformers' {architecture} models do not "
                "know. Give another model"
            )


def _family(path: Path, metadata: Mapping[str, Any], architecture: str) -> str:
    """The model type that computes what the file's architecture does, with or without experts."""
    routed = metadata.get(f"{architecture}.expert_count", 0) != 0
    named = {name: family for name, family in FAMILIES.items() if family.architecture == architecture}
    found = [name for name, family in named.items() if (family.experts is not None) == routed]
    if not found:
        what = "has experts" if routed else "has no experts"
        raise UserError(f"{path} says that a {architecture} model {what}, which is not read. Give another model")
    return found[0]


def _add_experts(path: Path, config: dict[str, Any], metadata: Mapping[str, Any], field: Field) -> None:
    """How many experts there are and what is theirs, of a family that has some."""
    experts = FAMILIES[config["model_type"]].experts
    if experts is None:
        return
    key = f"{metadata['general.architecture']}.expert_weights_norm"
    if metadata.get(key, experts.renormalized) is not experts.renormalized:
        raise UserError(f"{path} says {key}: {str(metadata[key])[:40]}, which llama.cpp ignores. Give another model")
    config[experts.count] = field("expert_count", int)
    config["num_experts_per_tok"] = met = field("expert_used_count", int)
    inner = config["intermediate_size"]
    if experts.inner is not None:
        config[experts.inner] = field("expert_feed_forward_length", int, max(inner // met, 1))
        config["norm_topk_prob"] = experts.renormalized
    if experts.shared is not None:
        config[experts.shared] = field("expert_shared_feed_forward_length", int, inner)


def config_head_size(hidden: int, heads: int) -> int:
    """Channels of one attention head where the file does not say; at least 1, so that nonsense fails later by name."""
    return max(hidden // heads, 1)


def _check_head_sizes(path: Path, config: Mapping[str, Any], field: Field) -> None:
    size = config["head_dim"]
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := field(key, int, size)) != size:
            raise UserError(
                f"{path} has attention heads of {size} channels and {key} {other}; both must be the same in these model "
                "families. Give another model"
            )


def _any_bias(header: GgufHeader, part: str) -> bool:
    """Whether some block has a bias in its attention or in its MLP."""
    return any(name.startswith("blk.") and f".{part}" in name and name.endswith(".bias") for name in header.tensors)


def _fields(path: Path, metadata: Mapping[str, Any], architecture: str) -> Field:
    """A reader of the architecture's own metadata that checks type and sign; without a default, absence is an error."""

    def field(key: str, kind: type[int] | type[float], default: Any = None) -> Any:
        name = f"{architecture}.{key}"
        value: Any = metadata.get(name, default)
        if isinstance(value, float) and kind is float:
            # Files hold float32; the shortest text of it is what the model's authors wrote.
            value = float(str(np.float32(value)))
        if type(value) is not kind or not 0 < value < 2**31:
            what = f"{value.count} values" if isinstance(value, GgufArray) else repr(value)[:40]
            raise BadFileError(path, f"metadata {name!r} must be one positive {kind.__name__}, got {what}", OTHER)
        return value

    return field


def _add_window(path: Path, config: dict[str, Any], metadata: Mapping[str, Any], architecture: str) -> None:
    """Sliding windows, where a file says so. transformers' llama has none, but its mistral is a llama that has."""
    window = metadata.get(f"{architecture}.attention.sliding_window", 0)
    if type(window) is not int or not 0 <= window < 2**31:
        raise BadFileError(path, f"has a sliding window of {str(window)[:40]}; it must be a number of tokens", OTHER)
    if window == 0:
        return
    config["sliding_window"] = window
    windowed = metadata.get(f"{architecture}{WINDOWED_LAYERS}")
    layers = config["num_hidden_layers"]
    if windowed is not None and (
        not isinstance(windowed, tuple) or len(windowed) != layers or any(type(w) is not bool for w in windowed)
    ):
        raise BadFileError(path, f"does not say for each of its {layers} layers whether it has a window", OTHER)
    if config["model_type"] == "mixtral":
        if windowed is not None and not all(windowed):
            raise UserError(f"{path} is a mixtral with windows in some layers only, which is not read")
        return
    if architecture == "llama":
        if windowed is not None and not all(windowed):
            raise UserError(f"{path} is a llama with windows in some layers only, which is not read")
        if config.pop("attention_bias") or config.get("mlp_bias"):
            raise UserError(f"{path} is a llama with a sliding window and biases, which is not read")
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        return
    config |= {"use_sliding_window": True, "max_window_layers": 0}
    if windowed is not None:
        config["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windowed]


def _name_mistral(config: dict[str, Any], metadata: Mapping[str, Any]) -> None:
    """Call a Mistral by its name; it computes what a Llama does (llama.cpp drops the first version's window)."""
    biased = config.get("attention_bias") or config.get("mlp_bias")
    if config["model_type"] == "llama" and not biased and "mistral" in str(metadata.get("general.name", "")).lower():
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
        del config["attention_bias"]


def _add_token_ids(path: Path, config: dict[str, Any], metadata: Mapping[str, Any]) -> None:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, GgufArray) and tokens.count > config["vocab_size"]:
        raise BadFileError(
            path, f"its tokenizer has {tokens.count} tokens, its embedding {config['vocab_size']}", OTHER
        )

    def token(key: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        return value if type(value) is int and 0 <= value < config["vocab_size"] else None

    for key, name in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
        if (found := token(key)) is not None:
            config[name] = found
    # The end of a turn and of a message end an answer as the end of the text does.
    ends = list(dict.fromkeys(found for key in ("eos", "eot", "eom") if (found := token(key)) is not None))
    if ends:
        config["eos_token_id"] = ends[0] if len(ends) == 1 else ends


def _rope_scaling(
    path: Path,
    metadata: Mapping[str, Any],
    config: Mapping[str, Any],
    field: Field,
    factors: NDArray[np.float64] | None,
) -> dict[str, Any] | None:
    kind = metadata.get(f"{metadata['general.architecture']}.rope.scaling.type", "none")
    if factors is not None:
        if kind not in ("none", "llama3"):
            raise UserError(
                f"{path} scales its rotary embedding twice: by {str(kind)[:40]!r} and by {ROPE_FREQUENCIES}"
            )
        return _factors_scaling(path, factors, config)
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": field("rope.scaling.factor", float)}
    if kind == "yarn":
        return _yarn(metadata, field)
    raise UserError(
        f"{path} scales its rotary embedding by {str(kind)[:40]!r}; none, linear, yarn and Llama 3's are read"
    )


def _yarn(metadata: Mapping[str, Any], field: Field) -> dict[str, Any]:
    factor = field("rope.scaling.factor", float)
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": field("rope.scaling.original_context_length", int),
    }
    prefix = f"{metadata['general.architecture']}.rope.scaling."
    for key in ("beta_fast", "beta_slow"):
        if f"{prefix}yarn_{key}" in metadata:
            scaling[key] = field(f"rope.scaling.yarn_{key}", float)
    for key in ("attn_factor", "yarn_attn_factor"):
        if f"{prefix}{key}" in metadata and (scale := field(f"rope.scaling.{key}", float)) != 1:
            # llama.cpp multiplies it to what follows from the factor; transformers takes the product.
            scaling["attention_factor"] = scale * (0.1 * math.log(factor) + 1)
    return scaling


def _factors_scaling(path: Path, factors: NDArray[np.float64], config: Mapping[str, Any]) -> dict[str, Any]:
    """What divides the frequencies, as a scaling that transformers has.

    Llama 3's is found again (arXiv:2407.21783, and the code of llama.cpp's converter): its largest factor is the scaling
    itself, and the others must then follow. Any other factors are a ``longrope`` whose two lists are the same.
    """
    half = config["head_dim"] // 2
    if factors.shape != (half,):
        raise BadFileError(
            path, f"{ROPE_FREQUENCIES} has shape {factors.shape}, the head size calls for {(half,)}", OTHER
        )
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise BadFileError(path, f"{ROPE_FREQUENCIES} holds factors that are not above 0", OTHER)
    factor = float(f"{factors.max():.6g}")  # float32 holds no more digits
    if factor >= 1 and np.allclose(factors, llama3_factors(config, {"factor": factor, **_LLAMA3}), rtol=1e-5):
        return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    listed = [float(str(np.float32(value))) for value in factors]
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config["max_position_embeddings"],
        "short_factor": listed,
        "long_factor": listed,
    }


def llama3_factors(config: Mapping[str, Any], scaling: Mapping[str, Any]) -> NDArray[np.float64]:
    """What Llama 3's ``scaling`` divides the frequencies of a head by, ``(head_dim / 2,)``."""
    half = config["head_dim"] // 2
    wavelengths = 2 * np.pi * config["rope_theta"] ** (np.arange(half) / half)
    low, high, context = (scaling[key] for key in _LLAMA3)
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / scaling["factor"] + smooth))
