"""Qwen 3 (dense): RMSNorm on every head of q and k."""

from __future__ import annotations

from quern.architectures.base import ARCHITECTURES
from quern.architectures.gated_decoder import GatedDecoder, window_by_type


@ARCHITECTURES.add("qwen3")
class Qwen3(GatedDecoder):
    """transformers' ``qwen3``."""

    model_type = "qwen3"
    module = "transformers.models.qwen3.modeling_qwen3"
    class_prefix = "Qwen3"

    def window(self, index: int) -> int:
        return window_by_type(self.config, index)
