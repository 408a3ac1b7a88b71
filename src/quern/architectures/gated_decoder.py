"""The layout that the Llama family and its descendants share: attention and gated MLP, an RMSNorm before each."""

from __future__ import annotations

import importlib
from collections.abc import Hashable
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from quern.architectures.base import Architecture, BlockSpec, LinearSpec, Rescaling
from quern.core.errors import UserError

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTPUT = "self_attn.o_proj"
ROLES = ("query", "key", "value")


class GatedDecoder(Architecture):
    """q, k, v, o and gate, up, down. A subclass names transformers' module and the prefix of its classes."""

    module: ClassVar[str]
    class_prefix: ClassVar[str]

    def block(self, index: int) -> BlockSpec:
        linears = (*self.attention(index), *self.gated_mlp(index, "mlp"))
        rescalings = (
            *self.attention_rescalings(),
            Rescaling("norm", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
            Rescaling("linear", "mlp.up_proj", ("mlp.down_proj",)),
        )
        return BlockSpec(index, self.block_prefix(index), linears, rescalings, self.window(index))

    def attention(self, index: int) -> tuple[LinearSpec, ...]:
        """q, k, v and o of block ``index``."""
        inner = [
            self.linear(index, name, role, "attention input", ATTENTION)
            for name, role in zip(ATTENTION, ROLES, strict=True)
        ]
        output = self.linear(index, OUTPUT, "output", "attention output")
        return (*inner, replace(output, added_to="input_layernorm"))

    def gated_mlp(self, index: int, name: str, expert: int | None = None) -> tuple[LinearSpec, ...]:
        """gate, up and down of the module called ``name``, relative to the block."""
        gate, up = f"{name}.gate_proj", f"{name}.up_proj"
        down = self.linear(index, f"{name}.down_proj", "down", f"{name} output", (), expert)
        return (
            self.linear(index, gate, "gate", f"{name} input", (gate, up), expert),
            self.linear(index, up, "up", f"{name} input", (gate, up), expert),
            replace(down, added_to="post_attention_layernorm" if expert is None else None),
        )

    def linear(
        self, index: int, name: str, role: str, group: str, fused: tuple[str, ...] = (), expert: int | None = None
    ) -> LinearSpec:
        """A linear of block ``index``, with the shape of its module."""
        rows, columns = self.parameters(index)[f"{name}.weight"]
        return LinearSpec(name, (rows, columns), role, group, expert, fused)

    def attention_rescalings(self) -> tuple[Rescaling, ...]:
        """Of the norm before attention, and of values."""
        heads = self.config.num_key_value_heads
        times = self.config.num_attention_heads // heads
        return (
            Rescaling("norm", "input_layernorm", ATTENTION),
            Rescaling("value", "self_attn.v_proj", (OUTPUT,), heads, times),
        )

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


KINDS = ("full_attention", "sliding_attention")


def window_by_type(config: Any, index: int) -> int:
    """``GatedDecoder.window`` of a family whose config says of each layer whether it is one of sliding attention. Raises
    ``UserError`` for kinds of layers that it does not know."""
    kind = config.layer_types[index]
    if kind not in KINDS:
        raise UserError(
            f"config.json: layer_types calls layer {index} {str(kind)[:40]!r}; known for {config.model_type}: "
            f"{', '.join(KINDS)}"
        )
    return int(config.sliding_window or 0) if kind == "sliding_attention" else 0
