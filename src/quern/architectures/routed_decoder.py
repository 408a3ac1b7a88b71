"""Decoders whose blocks send each token to a few of many gated MLPs, its experts: a router chooses and weighs them."""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quern.architectures.base import BlockSpec, Layout, LinearSpec, Rescaling, Source
from quern.architectures.gated_decoder import GatedDecoder
from quern.architectures.routing import SoftmaxRouter, routed_to
from quern.core.errors import UserError

ROLES = ("gate", "up", "down")


class Expert(nn.Module):
    """A gated MLP that reads the hidden states of some tokens ``(n, width)``."""

    def __init__(self, width: int, inner: int, activation: str) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.act_fn = ACT2FN[activation]

    def forward(self, hidden: Tensor) -> Tensor:
        """``(n, width)``."""
        made: Tensor = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
        return made


class Experts(nn.ModuleList):
    """The experts of a block as linears of their own; the stacks that transformers computes with hold the same numbers."""

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """hidden ``(tokens, width)``, chosen and weights ``(tokens, experts of each)`` -> ``(tokens, width)``."""
        result = torch.zeros_like(hidden)
        for number in torch.unique(chosen).tolist():
            tokens, place = torch.where(chosen == number)
            with routed_to(tokens):
                made = self[number](hidden[tokens]) * weights[tokens, place, None]
            result = result.index_add(0, tokens, made.to(result.dtype))
        return result


@dataclass(frozen=True)
class ExpertNames:
    """How a checkpoint calls what a routed block has instead of an MLP, relative to the block."""

    module: str = "mlp"
    linears: tuple[str, str, str] | None = ("gate_proj", "up_proj", "down_proj")
    """gate, up and down of each expert; None: stacked as ``experts.gate_up_proj`` ``(experts, 2 x inner, width)`` and
    ``experts.down_proj`` ``(experts, width, inner)``, as transformers 5 holds them in memory."""

    def source(self, prefix: str, expert: int, role: str, inner: int) -> Source:
        """Where a linear's weight lies; ``prefix`` is that of the block."""
        stem = f"{prefix}{self.module}.experts."
        if self.linears is not None:
            return Source(f"{stem}{expert}.{self.linears[ROLES.index(role)]}.weight")
        if role == "down":
            return Source(f"{stem}down_proj", expert)
        return Source(f"{stem}gate_up_proj", expert, (0, inner) if role == "gate" else (inner, 2 * inner))

    @property
    def pattern(self) -> re.Pattern[str]:
        """What matches names of experts' tensors, relative to the block."""
        last = r"(?:gate_up_proj|down_proj)" if self.linears is None else rf"\d+\.(?:{'|'.join(self.linears)})\.weight"
        return re.compile(rf"{self.module}\.experts\.{last}")


class RoutedDecoder(GatedDecoder):
    """q, k, v, o; a router and experts of gate, up, down; where ``shared`` names one, an MLP that every token meets too."""

    shared: ClassVar[str | None] = None
    """The shared expert, whose output is multiplied by a gate of its own."""
    names: ClassVar[tuple[ExpertNames, ...]] = (ExpertNames(), ExpertNames(linears=None))
    """The ways in which checkpoints call experts' tensors; the first one as the modules do."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        if self.experts and not (type(self.per_token) is int and 1 <= self.per_token <= self.experts):
            raise UserError(
                f"config.json: num_experts_per_tok must be an integer from 1 to the {self.experts} experts, "
                f"got {self.per_token!r}"
            )

    @property
    def experts(self) -> int:
        """Experts of a routed block."""
        return int(self.config.num_experts)

    @property
    def per_token(self) -> int:
        """Experts that a token meets."""
        found: int = self.config.num_experts_per_tok
        return found

    @property
    def expert_width(self) -> int:
        """Inner features of an expert."""
        return int(self.config.moe_intermediate_size)

    @property
    def softmax_router(self) -> SoftmaxRouter | None:
        """How experts are chosen; None: in a way that only the block's module knows."""
        return None

    def routed(self, index: int) -> bool:
        """Whether block ``index`` has experts."""
        if not self.experts:
            return False
        step = self.config.decoder_sparse_step
        return index not in self.config.mlp_only_layers and (index + 1) % step == 0

    def kind_of(self, index: int) -> Hashable:
        return self.routed(index)

    def block(self, index: int) -> BlockSpec:
        if not self.routed(index):
            return super().block(index)
        experts = [self.gated_mlp(index, f"mlp.experts.{number}", number) for number in range(self.experts)]
        shared = self.shared_mlp(index)
        linears = (
            *self.attention(index),
            *shared,
            *(linear for gate, up, _ in experts for linear in (gate, up)),
            *(down for _, _, down in experts),
        )
        rescalings = (
            *self.attention_rescalings(),
            *(Rescaling("linear", up.name, (down.name,)) for _, up, down in (*([shared] if shared else []), *experts)),
        )
        return BlockSpec(
            index, self.block_prefix(index), linears, rescalings, self.window(index), self.per_token, router="mlp.gate"
        )

    def shared_mlp(self, index: int) -> tuple[LinearSpec, ...]:
        """gate, up and down of the shared expert; what it makes is not just added, but gated first."""
        if self.shared is None:
            return ()
        gate, up, down = self.gated_mlp(index, self.shared)
        return gate, up, replace(down, added_to=None)

    def layout(self, names: Collection[str]) -> Layout:
        used = [style for style in self.names if self._first_named(style, names) is not None]
        if len(used) > 1:
            first, second = (self._first_named(style, names) for style in used[:2])
            raise UserError(
                f"the checkpoint names experts' tensors in two ways: {first!r} and {second!r}. "
                "It must be one or the other; get the checkpoint again"
            )
        style = used[0] if used else self.names[0]
        return self._laid_out(style) if style != self.names[0] else super().layout(names)

    def _first_named(self, style: ExpertNames, names: Collection[str]) -> str | None:
        """The first of the tensors of ``names`` that ``style`` calls so."""
        pattern = style.pattern
        stems = {self.block_prefix(index): index for index in range(self.layers) if self.routed(index)}
        found = (name for name in names if pattern.fullmatch(_behind_block(name)) and _block_of(name) in stems)
        return min(found, default=None)

    def _laid_out(self, style: ExpertNames) -> Layout:
        sources = dict(self._sources(style))
        shapes = {name: shape for name, shape in self.expected_shapes().items() if name not in sources}
        width, inner, count = self.config.hidden_size, self.expert_width, self.experts
        for name, source in sources.items():
            if source.index is None:
                shapes[source.tensor] = self.module_shapes()[name]
            else:
                shapes[source.tensor] = (count, width, inner) if source.rows is None else (count, 2 * inner, width)
        return Layout(sources, shapes)

    def _sources(self, style: ExpertNames) -> Iterator[tuple[str, Source]]:
        for index in filter(self.routed, range(self.layers)):
            prefix = self.block_prefix(index)
            if style.module != "mlp":
                for name in self.parameters(index):
                    if name.startswith("mlp.") and not name.startswith("mlp.experts."):
                        yield prefix + name, Source(f"{prefix}{style.module}.{name.removeprefix('mlp.')}")
            for expert in range(self.experts):
                for role in ROLES:
                    name = f"{prefix}mlp.experts.{expert}.{role}_proj.weight"
                    yield name, style.source(prefix, expert, role, self.expert_width)

    def build_block(self, index: int) -> nn.Module:
        block = super().build_block(index)
        if self.routed(index):
            self.with_linears(block)
        return block.eval()

    def adapt(self, model: Any) -> None:
        for index in filter(self.routed, range(self.layers)):
            with torch.device("meta"):
                self.with_linears(model.model.layers[index])
            model.model.layers[index].mlp.experts.to(model.dtype)

    def with_linears(self, block: Any) -> None:
        """Give a routed block of transformers' experts that are linears."""
        shape = self.config.hidden_size, self.expert_width, self.config.hidden_act
        block.mlp.experts = Experts(Expert(*shape) for _ in range(self.experts))


_BLOCK = re.compile(r"(model\.layers\.\d+\.)(.*)")


def _block_of(name: str) -> str:
    match = _BLOCK.fullmatch(name)
    return match[1] if match else ""


def _behind_block(name: str) -> str:
    match = _BLOCK.fullmatch(name)
    return match[2] if match else ""
