"""Qwen 3 with experts (30B-A3B, 235B-A22B, Coder): RMSNorm on every head of q and k, no shared expert."""

from __future__ import annotations

from quern.architectures.base import ARCHITECTURES
from quern.architectures.routed_decoder import RoutedDecoder
from quern.architectures.routing import SoftmaxRouter


@ARCHITECTURES.add("qwen3_moe")
class Qwen3Moe(RoutedDecoder):
    """transformers' ``qwen3_moe``."""

    model_type = "qwen3_moe"
    module = "transformers.models.qwen3_moe.modeling_qwen3_moe"
    class_prefix = "Qwen3Moe"

    def window(self, index: int) -> int:
        return int(self.config.sliding_window or 0)

    @property
    def softmax_router(self) -> SoftmaxRouter:
        return SoftmaxRouter("mlp.gate", self.config.norm_topk_prob)
