"""The layout that the Llama family and its descendants share: attention and gated MLP, an RMSNorm before each."""

from __future__ import annotations

import importlib
from collections.abc import Hashable
from typing import Any, ClassVar

from torch import nn

from quern.architectures.base import Architecture, BlockSpec, LinearSpec, Rescaling

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj")
LINEARS = (
    ("self_attn.q_proj", "query", "attention input", ATTENTION),
    ("self_attn.k_proj", "key", "attention input", ATTENTION),
    ("self_attn.v_proj", "value", "attention input", ATTENTION),
    ("self_attn.o_proj", "output", "attention output", ()),
    ("mlp.gate_proj", "gate", "mlp input", GATED),
    ("mlp.up_proj", "up", "mlp input", GATED),
    ("mlp.down_proj", "down", "mlp output", ()),
)
"""Name, role, input group, and what it is fused with."""


class GatedDecoder(Architecture):
    """q, k, v, o and gate, up, down. A subclass names transformers' module and the prefix of its classes."""

    module: ClassVar[str]
    class_prefix: ClassVar[str]

    def block(self, index: int) -> BlockSpec:
        shapes = self.parameters(index)
        linears = []
        for name, role, group, fused in LINEARS:
            rows, columns = shapes[f"{name}.weight"]
            linears.append(LinearSpec(name, (rows, columns), role, group, fused_with=fused))
        heads = self.config.num_key_value_heads
        rescalings = (
            Rescaling("norm", "input_layernorm", ATTENTION),
            Rescaling(
                "value", "self_attn.v_proj", ("self_attn.o_proj",), heads, self.config.num_attention_heads // heads
            ),
            Rescaling("norm", "post_attention_layernorm", GATED),
            Rescaling("linear", "mlp.up_proj", ("mlp.down_proj",)),
        )
        return BlockSpec(index, self.block_prefix(index), tuple(linears), rescalings, self.window(index))

    def window(self, index: int) -> int:
        """How many positions the attention of block ``index`` sees back, itself included; 0: all. Families may say more."""
        return 0

    def kind_of(self, index: int) -> Hashable:
        return None

    def _class(self, suffix: str) -> Any:
        return getattr(importlib.import_module(self.module), self.class_prefix + suffix)

    def build_block(self, index: int) -> nn.Module:
        block: nn.Module = self._class("DecoderLayer")(self.config, index)
        return block.eval()

    def build_rotary(self) -> nn.Module:
        rotary: nn.Module = self._class("RotaryEmbedding")(self.config)
        return rotary

    def build_norm(self) -> nn.Module:
        norm: nn.Module = self._class("RMSNorm")(self.config.hidden_size, eps=self.config.rms_norm_eps)
        return norm


def window_by_type(config: Any, index: int) -> int:
    """``GatedDecoder.window`` of a family whose config says of each layer whether it is one of sliding attention."""
    return int(config.sliding_window or 0) if config.layer_types[index] == "sliding_attention" else 0
