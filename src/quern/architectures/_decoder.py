"""The layout that the Llama family and its descendants share: attention and gated MLP, an RMSNorm before each."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

from torch import nn

from quern.architectures.base import Architecture, LinearGroup, Rescaling


class GatedDecoder(Architecture):
    """q, k, v, o and gate, up, down. A subclass names transformers' module and the prefix of its classes."""

    module: ClassVar[str]
    class_prefix: ClassVar[str]

    groups = (
        LinearGroup("attention input", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        LinearGroup("attention output", ("self_attn.o_proj",)),
        LinearGroup("mlp input", ("mlp.gate_proj", "mlp.up_proj")),
        LinearGroup("mlp output", ("mlp.down_proj",)),
    )
    rescalings = (
        Rescaling("norm", "input_layernorm", groups[0].linears),
        Rescaling("value", "self_attn.v_proj", groups[1].linears),
        Rescaling("norm", "post_attention_layernorm", groups[2].linears),
        Rescaling("linear", "mlp.up_proj", groups[3].linears),
    )
    roles = {
        "self_attn.q_proj": "query",
        "self_attn.k_proj": "key",
        "self_attn.v_proj": "value",
        "self_attn.o_proj": "output",
        "mlp.gate_proj": "gate",
        "mlp.up_proj": "up",
        "mlp.down_proj": "down",
    }

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


def windows_by_type(config: Any) -> list[int]:
    """``GatedDecoder.windows`` of a family whose config says of each layer whether it is one of sliding attention."""
    window = int(config.sliding_window or 0)
    return [window if kind == "sliding_attention" else 0 for kind in config.layer_types]
