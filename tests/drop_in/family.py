"""A family whose blocks differ: dense ones, and routed ones with stacked experts and a shared one (dropped into architectures/)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from quern.architectures.base import ARCHITECTURES, BlockSpec, Rescaling, Shapes, Source
from quern.architectures.gated_decoder import GatedDecoder
from quern.architectures.routing import routed_to


class Experts(nn.Module):
    """The experts of a block as linears of their own; the stack that transformers computes with holds the same numbers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.moe_intermediate_size
        self.act_fn = ACT2FN[config.hidden_act]
        for expert in range(config.num_experts):
            linears = nn.Module()
            linears.gate_proj = nn.Linear(width, inner, bias=False)
            linears.up_proj = nn.Linear(width, inner, bias=False)
            linears.down_proj = nn.Linear(inner, width, bias=False)
            self.add_module(str(expert), linears)

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """hidden ``(tokens, width)``, chosen and weights ``(tokens, experts of each)`` -> ``(tokens, width)``."""
        result = torch.zeros_like(hidden)
        for name, expert in self.named_children():
            if not name.isdigit():
                continue
            tokens, place = torch.where(chosen == int(name))
            if not len(tokens):
                continue
            with routed_to(tokens):
                inner = self.act_fn(expert.gate_proj(hidden[tokens])) * expert.up_proj(hidden[tokens])
                made = expert.down_proj(inner) * weights[tokens, place, None]
            result = result.index_add(0, tokens, made.to(result.dtype))
        return result


@ARCHITECTURES.add("qwen2_moe")
class Qwen2Moe(GatedDecoder):
    """transformers' ``qwen2_moe``."""

    model_type = "qwen2_moe"
    module = "transformers.models.qwen2_moe.modeling_qwen2_moe"
    class_prefix = "Qwen2Moe"

    def routed(self, index: int) -> bool:
        """Whether block ``index`` has experts."""
        config = self.config
        return index not in config.mlp_only_layers and (index + 1) % config.decoder_sparse_step == 0

    def kind_of(self, index: int) -> Hashable:
        return self.routed(index)

    def block(self, index: int) -> BlockSpec:
        if not self.routed(index):
            return super().block(index)
        experts = [self.gated_mlp(index, f"mlp.experts.{e}", e) for e in range(self.config.num_experts)]
        inputs = [linear for gate, up, _ in experts for linear in (gate, up)]
        linears = (
            *self.attention(index),
            *self.gated_mlp(index, "mlp.shared_expert"),
            *inputs,
            *(down for _, _, down in experts),
        )
        rescalings = [Rescaling("linear", up.name, (down.name,)) for _, up, down in experts]
        prefix = self.block_prefix(index)
        return BlockSpec(
            index,
            prefix,
            linears,
            (*self.attention_rescalings(), *rescalings),
            experts_per_token=self.config.num_experts_per_tok,
            sources=self.stacked(prefix),
        )

    def stacked(self, prefix: str) -> dict[str, tuple[Source, ...]]:
        """Where the experts' weights lie."""
        inner, found = self.config.moe_intermediate_size, {}
        for expert in range(self.config.num_experts):
            for name, rows in {"gate_proj": (0, inner), "up_proj": (inner, 2 * inner)}.items():
                source = Source(f"{prefix}mlp.experts.gate_up_proj", expert, rows)
                found[f"mlp.experts.{expert}.{name}.weight"] = (source,)
            found[f"mlp.experts.{expert}.down_proj.weight"] = (Source(f"{prefix}mlp.experts.down_proj", expert),)
        return found

    def expected_shapes(self) -> Shapes:
        width, inner, count = self.config.hidden_size, self.config.moe_intermediate_size, self.config.num_experts
        shapes = {name: shape for name, shape in self.module_shapes().items() if ".mlp.experts." not in name}
        for block in self.blocks:
            if block.sources:
                shapes[f"{block.prefix}mlp.experts.gate_up_proj"] = (count, 2 * inner, width)
                shapes[f"{block.prefix}mlp.experts.down_proj"] = (count, width, inner)
        return shapes

    def build_block(self, index: int) -> nn.Module:
        block = super().build_block(index)
        if self.routed(index):
            block.mlp.experts = Experts(self.config)
        return block.eval()

    def build_model(self, dtype: torch.dtype) -> Any:
        model = super().build_model(dtype)
        with torch.device("meta"):
            for index in filter(self.routed, range(self.layers)):
                model.model.layers[index].mlp.experts = Experts(self.config).to(dtype)
        return model
