"""A model's configuration as the metadata that llama.cpp reads: the inverse of ``gguf/config.py``.

What llama.cpp's graph of a family does not compute is refused before anything is written, or noted where it is only beyond
some length of text that the results part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from quern.checkpoint.gguf.config import WINDOWED_LAYERS, config_head_size, llama3_factors
from quern.checkpoint.gguf.names import FAMILIES, Experts, Family
from quern.core.errors import UserError

QUANTIZATION_VERSION = 2
"""``general.quantization_version`` of all of today's block types."""
_YARN = ("rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
         "attention_factor", "truncate")  # fmt: skip


@dataclass
class ModelMetadata:
    """What a GGUF says of the model itself."""

    values: dict[str, Any]
    factors: torch.Tensor | None = None
    """float32 ``(head size / 2,)`` that divide the frequencies of the rotary embedding; None: there are none."""
    notes: list[str] = field(default_factory=list)


def model_metadata(config: Mapping[str, Any], windows: Sequence[int], name: str) -> ModelMetadata:
    """The metadata of a model. ``config``: as transformers' configuration class completes it; ``windows``: positions that
    the attention of each layer sees back, 0 for all; ``name``: for people.

    Raises ``UserError`` for families and choices that llama.cpp does not run.
    """
    family = FAMILIES.get(config["model_type"])
    if family is None:
        raise UserError(
            f"a {config['model_type']!r} model is not written as GGUF; families that are: {', '.join(FAMILIES)}. Use format "
            "quern"
        )
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_size = config.get("head_dim") or config_head_size(hidden, heads)
    _refuse_foreign(config, family, head_size)
    arch = family.architecture
    values: dict[str, Any] = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": name if family.label.lower() in name.lower() else f"{name} ({family.label})",
        "general.quantization_version": QUANTIZATION_VERSION,
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": hidden,
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{arch}.attention.key_length": head_size,
        f"{arch}.attention.value_length": head_size,
        f"{arch}.rope.dimension_count": head_size,
        f"{arch}.vocab_size": config["vocab_size"],
    }
    made = ModelMetadata(values)
    _add_experts(made.values, config, family)
    _add_rope(made, config, family, head_size)
    _add_windows(made, config, windows, arch)
    return made


def _refuse_foreign(config: Mapping[str, Any], family: Family, head_size: int) -> None:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    problem = None
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        problem = f"has the activation {config['hidden_act']}, llama.cpp computes silu"
    elif not family.head_sizes and head_size * heads != hidden:
        problem = f"has {heads} heads of {head_size} channels, llama.cpp takes {hidden} / {heads} of each"
    elif config.get("attention_bias") and not family.rotates_neighbours:
        problem = "has a bias in o_proj (attention_bias), llama.cpp has none there"
    elif config.get("tie_word_embeddings") and not family.tied:
        problem = "has its embedding as its head, llama.cpp wants a head of its own"
    elif family.experts is not None:
        problem = _foreign_experts(config, family.experts)
    if problem:
        raise UserError(f"this {config['model_type']} model {problem}. Use format quern")


def _foreign_experts(config: Mapping[str, Any], experts: Experts) -> str | None:
    """What llama.cpp does not compute of a model with experts, as a clause; None: it computes all."""
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        return "has blocks without experts, llama.cpp wants some in all"
    if config.get("norm_topk_prob", experts.renormalized) is not experts.renormalized:
        said = "divides" if experts.renormalized else "does not divide"
        given = config["norm_topk_prob"]
        return f"has norm_topk_prob {given}, llama.cpp {said} the weights of a token's experts by their sum"
    return None


def _add_experts(values: dict[str, Any], config: Mapping[str, Any], family: Family) -> None:
    arch, experts = family.architecture, family.experts
    if experts is None:
        return
    # transformers' configuration classes have two names for it.
    values[f"{arch}.expert_count"] = config.get("num_experts") or config["num_local_experts"]
    values[f"{arch}.expert_used_count"] = config["num_experts_per_tok"]
    if experts.inner is not None:
        values[f"{arch}.expert_feed_forward_length"] = config[experts.inner]
    if experts.shared is not None:
        values[f"{arch}.expert_shared_feed_forward_length"] = config[experts.shared]


def _add_rope(made: ModelMetadata, config: Mapping[str, Any], family: Family, head_size: int) -> None:
    arch, rope = family.architecture, dict(config.get("rope_parameters") or {})
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    made.values[f"{arch}.rope.freq_base"] = float(theta)
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(
            "only a part of each head is rotated, which these families of llama.cpp do not do. Use format quern"
        )
    factors = None
    if kind == "llama3":
        factors = llama3_factors({"head_dim": head_size, "rope_theta": theta}, rope)
    elif kind == "longrope" and rope["short_factor"] == rope["long_factor"] and rope.get("attention_factor") == 1:
        factors = np.asarray(rope["long_factor"])
    elif kind == "linear":
        made.values[f"{arch}.rope.scaling.type"] = "linear"
        made.values[f"{arch}.rope.scaling.factor"] = float(rope["factor"])
    elif kind == "yarn" and not (set(rope) - set(_YARN)) and rope.get("truncate", True):
        _add_yarn(made.values, f"{arch}.rope.scaling.", rope)
    elif kind != "default":
        raise UserError(
            f"the rotary embedding is scaled by {kind!r} as llama.cpp's {arch} does not; none, linear, yarn and Llama 3's "
            "are written. Use format quern"
        )
    if factors is not None:
        if not family.frequencies:
            raise UserError(f"llama.cpp's {arch} reads no factors of the rotary embedding ({kind}). Use format quern")
        made.factors = torch.from_numpy(factors).float()


def _add_yarn(values: dict[str, Any], prefix: str, rope: Mapping[str, Any]) -> None:
    factor = float(rope["factor"])
    values[f"{prefix}type"] = "yarn"
    values[f"{prefix}factor"] = factor
    values[f"{prefix}original_context_length"] = int(rope["original_max_position_embeddings"])
    for key in ("beta_fast", "beta_slow"):
        if rope.get(key) is not None:
            values[f"{prefix}yarn_{key}"] = float(rope[key])
    if rope.get("attention_factor") is not None:
        # llama.cpp multiplies it to what follows from the factor; transformers has the product.
        values[f"{prefix}attn_factor"] = float(rope["attention_factor"]) / (0.1 * math.log(factor) + 1)


def _add_windows(made: ModelMetadata, config: Mapping[str, Any], windows: Sequence[int], arch: str) -> None:
    length = config["max_position_embeddings"]
    least = min((window for window in windows if window), default=0)
    if not least:
        return
    made.values[f"{arch}.attention.sliding_window"] = least
    if not all(windows):
        made.values[f"{arch}{WINDOWED_LAYERS}"] = [bool(window) for window in windows]
    if least < length:
        made.notes.append(
            f"the model's attention sees {least} positions back, llama.cpp's {arch} sees all: longer texts are computed "
            "otherwise there"
        )
