"""Blocks that send tokens to experts, as native steps (csrc/engine/routing.h)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from quern import _native
from quern.architectures.base import BlockSpec, LinearSpec
from quern.architectures.routed_decoder import RoutedDecoder
from quern.engines._cpu_buffers import Buffers
from quern.engines._cpu_weights import MappedWeights

ROLES = ("gate", "up", "down")
Mlp = tuple[_native.Linear, _native.Linear, _native.Linear]


@dataclass(frozen=True)
class Gated:
    """The linears of a gated MLP."""

    gate: LinearSpec
    up: LinearSpec
    down: LinearSpec

    @property
    def inner(self) -> int:
        """Features between gate and down."""
        return self.gate.shape[0]

    def native(self, weights: MappedWeights, prefix: str) -> Mlp:
        """Its matrices."""
        gate, up, down = (weights.linear(prefix + each.name, each.shape) for each in (self.gate, self.up, self.down))
        return gate, up, down


def shares_expert(block: BlockSpec) -> bool:
    """Whether every token meets an MLP of the block beside its experts."""
    return block.experts_per_token > 0 and any(one.role in ROLES and one.expert is None for one in block.linears)


def gated_by_expert(block: BlockSpec) -> dict[int | None, Gated]:
    """The MLPs of a block by expert, in order; None is that of a dense block, or one that every token meets beside others.

    Raises ``ValueError`` where some are no gated MLPs.
    """
    found: dict[int | None, dict[str, LinearSpec]] = defaultdict(dict)
    for linear in block.linears:
        if linear.role in ROLES:
            found[linear.expert][linear.role] = linear
    if any(set(roles) != set(ROLES) for roles in found.values()):
        raise ValueError(f"{block.prefix} has experts that are not {', '.join(ROLES)}")
    order = sorted(found, key=lambda expert: -1 if expert is None else expert)
    return {expert: Gated(*(found[expert][role] for role in ROLES)) for expert in order}


class RoutedSteps:
    """From what a routed block's MLPs read to what they add."""

    def __init__(self, architecture: RoutedDecoder, weights: MappedWeights, activation: str) -> None:
        self._architecture, self._weights, self._activation = architecture, weights, activation

    def steps(self, block: BlockSpec, buffers: Buffers, normed: int, branch: int) -> list[_native.Step]:
        """``normed``, ``branch``: the buffers of both."""
        router = self._architecture.softmax_router
        assert router is not None  # the engine has asked
        gated, width, count = gated_by_expert(block), self._architecture.config.hidden_size, block.experts_per_token
        shared = gated.pop(None, None)
        scores = [self._linear(block, router.module, (len(gated), width))]
        scored, beside, common = [buffers.of("scores", len(gated))], None, None
        if shared is not None:
            assert router.shared_gate is not None
            scores.append(self._linear(block, router.shared_gate, (1, width)))
            scored.append(buffers.of("shared score", 1))
            gate, up = (buffers.of(f"shared {name}", shared.inner) for name in ("gate", "up"))
            beside = (scored[-1], gate, up, buffers.of("shared branch", width))
            common = shared.native(self._weights, block.prefix)
        experts = self._experts(block, list(gated.values()))
        inner = gated[0].inner
        places = (
            normed,
            scored[0],
            buffers.of("experts' gates", count * inner),
            buffers.of("experts' ups", count * inner),
            buffers.of("experts' branches", count * width),
            branch,
        )
        step = _native.Step
        return [
            step.project(normed, scores, scored),
            step.routed(places, count, router.renormalized, self._activation, experts, beside, common),
        ]

    def _linear(self, block: BlockSpec, name: str, shape: tuple[int, int]) -> _native.Linear:
        return self._weights.linear(block.prefix + name, shape)

    def _experts(self, block: BlockSpec, gated: list[Gated]) -> list[Mlp]:
        """Their matrices; a token reads those of as many as it meets."""
        before = self._weights.read_bytes
        experts = [each.native(self._weights, block.prefix) for each in gated]
        read = self._weights.read_bytes - before
        self._weights.read_bytes = before + read * block.experts_per_token // len(gated)
        return experts
