"""A family whose blocks differ: first dense ones, then routed ones with a router of another kind and stacked experts beside a
shared one (dropped into architectures/)."""

from __future__ import annotations

from typing import Any

from torch import nn

from quern.architectures.base import ARCHITECTURES, LinearSpec
from quern.architectures.gated_decoder import window_by_type
from quern.architectures.routed_decoder import RoutedDecoder


@ARCHITECTURES.add("dots1")
class Dots1(RoutedDecoder):
    """transformers' ``dots1``: sigmoid scores with a bias that only the choice sees."""

    model_type = "dots1"
    module = "transformers.models.dots1.modeling_dots1"
    class_prefix = "Dots1"

    @property
    def experts(self) -> int:
        return int(self.config.n_routed_experts)

    def routed(self, index: int) -> bool:
        return index >= int(self.config.first_k_dense_replace)

    def shared_mlp(self, index: int) -> tuple[LinearSpec, ...]:
        return self.gated_mlp(index, "mlp.shared_experts")

    def window(self, index: int) -> int:
        return window_by_type(self.config, index)

    def with_linears(self, block: Any) -> None:
        super().with_linears(block)
        router = block.mlp.gate
        bias = router._buffers.pop("e_score_correction_bias")
        router.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)
