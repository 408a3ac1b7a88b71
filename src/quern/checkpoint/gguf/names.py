"""What llama.cpp calls families, tensors and rows that transformers calls otherwise, in both directions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from quern.core.errors import BadFileError, UserError

ROPE_FREQUENCIES = "rope_freqs.weight"
"""What divides the frequencies of the rotary embedding."""
OTHER = "Give another file of a whole model"
"""What helps where a file holds something else than a model of these families."""


@dataclass(frozen=True)
class Experts:
    """What llama.cpp takes for granted of a family whose blocks send tokens to experts."""

    count: str
    """Key of config.json for how many there are."""
    renormalized: bool
    """Whether the weights of a token's experts are divided by their sum."""
    inner: str | None = None
    """Key for an expert's inner features; None: those of an ordinary MLP."""
    shared: str | None = None
    """Key for those of an expert that every token meets; None: there is no such expert."""


@dataclass(frozen=True)
class Family:
    """A family of models as both sides know it."""

    architecture: str
    """``general.architecture``."""
    class_name: str
    """transformers' class."""
    rotates_neighbours: bool = False
    """Whether llama.cpp rotates channels 2 i and 2 i + 1 of a head, so that rows of q and k are reordered."""
    head_sizes: bool = True
    """Whether llama.cpp takes heads of another size than the hidden size over their number."""
    frequencies: bool = False
    """Whether it reads ``rope_freqs.weight``."""
    wide: Literal["never", "shared", "always"] = "never"
    """Whether llama.cpp takes a model of 80 layers for one of 70B parameters, whose values its mixes give more bits: never,
    where several query heads share a value head, or always."""
    label: str = ""
    """What has to stand in ``general.name`` for the family to be told from another one of the same architecture."""
    experts: Experts | None = None
    """Of a family whose blocks all have some; by them it is told from a dense one of the same architecture."""
    tied: bool = True
    """Whether the head may be the embedding."""


FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", rotates_neighbours=True, frequencies=True, wide="shared"),
    "mistral": Family(
        "llama", "MistralForCausalLM", rotates_neighbours=True, frequencies=True, wide="shared", label="Mistral"
    ),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", head_sizes=False, wide="always"),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM"),
    "mixtral": Family(
        "llama",
        "MixtralForCausalLM",
        rotates_neighbours=True,
        frequencies=True,
        experts=Experts("num_local_experts", renormalized=True),
    ),
    "qwen2_moe": Family(
        "qwen2moe",
        "Qwen2MoeForCausalLM",
        head_sizes=False,
        experts=Experts(
            "num_experts",
            renormalized=False,
            inner="moe_intermediate_size",
            shared="shared_expert_intermediate_size",
        ),
        tied=False,
    ),
    "qwen3_moe": Family(
        "qwen3moe",
        "Qwen3MoeForCausalLM",
        experts=Experts("num_experts", renormalized=True, inner="moe_intermediate_size"),
    ),
}
"""By ``model_type`` of config.json."""

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
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_STACKS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
"""Of all experts of a block, one behind the other."""
ROUTERS = (".ffn_gate_inp.weight", ".ffn_gate_inp_shexp.weight")
"""Ends of the names of matrices that are float32 always."""
_TO_OUTSIDE = {ours: theirs for theirs, ours in _OUTSIDE.items()}
_TO_INSIDE = {ours: theirs for theirs, ours in _INSIDE.items()}
_TO_STACK = {ours: theirs for theirs, ours in _STACKS.items()}
_BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(\w+)\.weight")
_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def transformers_name(path: Path, stored: str) -> str:
    """transformers' name of a tensor that ``path`` holds. Raises ``BadFileError`` for one of another family."""
    if stored in _OUTSIDE:
        return _OUTSIDE[stored]
    match = _BLOCK.fullmatch(stored)
    if match is None or match[2] not in _INSIDE:
        raise BadFileError(path, f"holds tensor {stored!r}, which these model families do not have", OTHER)
    return f"model.layers.{int(match[1])}.{_INSIDE[match[2]]}.{match[3]}"


def names_of_experts(stored: str) -> tuple[str, str] | None:
    """What stands before and behind an expert's number in transformers' names of the parts of a stack; None of others."""
    match = _BLOCK.fullmatch(stored)
    if match is None or match[2] not in _STACKS or match[3] != "weight":
        return None
    return f"model.layers.{int(match[1])}.mlp.experts.", f".{_STACKS[match[2]]}.weight"


def expert_of(name: str) -> int | None:
    """The number of the expert whose tensor (transformers' name) is a part of a stack; None of others."""
    match = _EXPERT.fullmatch(name)
    return int(match[2]) if match and match[3] in _TO_STACK else None


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor, or of the stack that it is a part of. Raises ``UserError`` for one that it has no name
    for."""
    if name in _TO_OUTSIDE:
        return _TO_OUTSIDE[name]
    if (expert := _EXPERT.fullmatch(name)) is not None and expert[3] in _TO_STACK:
        return f"blk.{int(expert[1])}.{_TO_STACK[expert[3]]}.weight"
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in _TO_INSIDE:
        raise UserError(f"llama.cpp has no name for the tensor {name!r} in the families that are written as GGUF")
    return f"blk.{int(match[1])}.{_TO_INSIDE[match[2]]}.{match[3]}"


def reordered_heads(config: Mapping[str, Any], name: str) -> int | None:
    """The number of heads of a tensor (transformers' name) whose rows llama.cpp has in another order; None of others."""
    family = FAMILIES.get(config["model_type"])
    if family is None or not family.rotates_neighbours:
        return None
    part = name.rpartition(".")[0].rpartition(".")[2]
    return int(config[_HEADS[part]]) if part in _HEADS else None


def restore_row_order(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of the rows of q and k.

    transformers rotates row i of a head with row i + size/2; llama.cpp rotates neighbours, so its converter interleaves
    the halves. ``tensor``: ``(heads * size, ...)``.
    """
    return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def interleave_rows(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of the rows of q and k: the inverse of ``restore_row_order``. ``tensor``: ``(heads * size, ...)``,
    values or the bytes of encoded rows."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
