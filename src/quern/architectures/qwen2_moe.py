"""Qwen 1.5 and 2 with experts: biases on q, k and v, and a shared expert behind a sigmoid gate."""

from __future__ import annotations

from quern.architectures.base import ARCHITECTURES
from quern.architectures.gated_decoder import window_by_type
from quern.architectures.routed_decoder import RoutedDecoder
from quern.architectures.routing import SoftmaxRouter


@ARCHITECTURES.add("qwen2_moe")
class Qwen2Moe(RoutedDecoder):
    """transformers' ``qwen2_moe``."""

    model_type = "qwen2_moe"
    module = "transformers.models.qwen2_moe.modeling_qwen2_moe"
    class_prefix = "Qwen2Moe"
    shared = "mlp.shared_expert"

    def window(self, index: int) -> int:
        return window_by_type(self.config, index)

    @property
    def softmax_router(self) -> SoftmaxRouter:
        return SoftmaxRouter("mlp.gate", self.config.norm_topk_prob, "mlp.shared_expert_gate")
