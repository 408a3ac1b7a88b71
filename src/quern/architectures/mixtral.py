"""Mixtral 8x7B and 8x22B: every block is routed, and checkpoints have other names than transformers' modules."""

from __future__ import annotations

from typing import ClassVar

from quern.architectures.base import ARCHITECTURES
from quern.architectures.routed_decoder import ExpertNames, RoutedDecoder
from quern.architectures.routing import SoftmaxRouter

STORED = "block_sparse_moe"


@ARCHITECTURES.add("mixtral")
class Mixtral(RoutedDecoder):
    """transformers' ``mixtral``."""

    model_type = "mixtral"
    module = "transformers.models.mixtral.modeling_mixtral"
    class_prefix = "Mixtral"
    renamed = True
    names: ClassVar[tuple[ExpertNames, ...]] = (
        *RoutedDecoder.names,
        ExpertNames(STORED, ("w1", "w3", "w2")),
        ExpertNames(STORED, None),
    )

    @property
    def expert_width(self) -> int:
        return int(self.config.intermediate_size)

    def routed(self, index: int) -> bool:
        return True

    def window(self, index: int) -> int:
        return int(self.config.sliding_window or 0)

    @property
    def softmax_router(self) -> SoftmaxRouter:
        return SoftmaxRouter("mlp.gate", True)
