"""Families of models as lists of native steps: all that the CPU engine knows of their layers.

Steps read and write buffers, which have a row of numbers for each token (csrc/engine/steps.h). A layer may look like
no other: each is described by its index.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quern import _native
from quern.architectures.base import BlockSpec
from quern.architectures.gated_decoder import GatedDecoder
from quern.architectures.rotary import frequencies
from quern.architectures.routed_decoder import RoutedDecoder
from quern.engines._cpu_buffers import Buffers
from quern.engines._cpu_routing import RoutedSteps, gated_by_expert
from quern.engines._cpu_weights import MappedWeights

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
"""Names in config.json, as transformers means them, and the native function that computes it."""


class GatedSteps:
    """The steps of the layout that the Llama family and its descendants share."""

    def __init__(self, architecture: GatedDecoder, weights: MappedWeights) -> None:
        config = architecture.config
        self._architecture, self._weights = architecture, weights
        self.buffers = Buffers()
        self.epsilon = float(config.rms_norm_eps)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.width = int(config.hidden_size)
        self.heads = int(config.num_attention_heads)
        self.key_value_heads, self.head_dim = kept_heads(architecture)[0]
        self.hidden, self.normed = self.buffers.of("hidden", self.width), self.buffers.of("normed", self.width)
        self.branch = self.buffers.of("branch", self.width)

    def layer(self, index: int) -> list[_native.Step]:
        """Attention and gated MLP, or experts, of layer ``index``, a norm before each."""
        step, block = _native.Step, self._architecture.block(index)
        prefix = block.prefix
        return [
            self.norm(f"{prefix}input_layernorm.weight"),
            *self.attention(block),
            step.add(self.branch, self.hidden),
            self.norm(f"{prefix}post_attention_layernorm.weight"),
            *(self.routed(block) if block.experts_per_token else self.gated(block)),
            step.add(self.branch, self.hidden),
        ]

    def norm(self, name: str) -> _native.Step:
        """What a block reads: the hidden states through the norm called ``name``."""
        return _native.Step.norm(self.hidden, self.normed, self._weights.vector(name, self.width), self.epsilon)

    def attention(self, block: BlockSpec) -> list[_native.Step]:
        """From the normed hidden states to what attention adds to them."""
        size, step, prefix, index = self.head_dim, _native.Step, block.prefix, block.index
        width, key_width = self.heads * size, self.key_value_heads * size
        query, attended = self.buffers.of("query", width), self.buffers.of("attended", width)
        key, value = self.buffers.of("key", key_width), self.buffers.of("value", key_width)
        query_norm = self._weights.optional_vector(f"{prefix}self_attn.q_norm.weight", size)
        key_norm = self._weights.optional_vector(f"{prefix}self_attn.k_norm.weight", size)
        # Integer caches hold keys without their bias (csrc/engine/cache.h); what a norm made of it cannot be taken away.
        apart = key_norm is None
        linears = [
            self._linear(block, "query", (width, self.width)),
            self._linear(block, "key", (key_width, self.width), bias=not apart),
            self._linear(block, "value", (key_width, self.width)),
        ]
        key_bias = self._weights.optional_vector(f"{prefix}{_by_role(block, 'key')}.bias", key_width) if apart else None
        return [
            step.project(self.normed, linears, [query, key, value]),
            *([] if query_norm is None else [step.norm(query, query, query_norm, self.epsilon)]),
            *([] if key_norm is None else [step.norm(key, key, key_norm, self.epsilon)]),
            step.rotate(query, scale=float(np.float32(1) / np.sqrt(np.float32(size)))),
            step.store(index, key, value, key_bias),
            step.attend(index, query, attended, block.window, key_bias),
            step.project(attended, [self._linear(block, "output", (self.width, width))], [self.branch]),
        ]

    def gated(self, block: BlockSpec) -> list[_native.Step]:
        """From the normed hidden states to what the MLP adds to them."""
        mlp = gated_by_expert(block)[None]
        gate, up = self.buffers.of("gate", mlp.inner), self.buffers.of("up", mlp.inner)
        *wide, down = mlp.native(self._weights, block.prefix)
        return [
            _native.Step.project(self.normed, wide, [gate, up]),
            _native.Step.activate(self.activation, gate, up),
            _native.Step.project(gate, [down], [self.branch]),
        ]

    def routed(self, block: BlockSpec) -> list[_native.Step]:
        """From the normed hidden states to what the block's experts add to them."""
        assert isinstance(self._architecture, RoutedDecoder)
        made = RoutedSteps(self._architecture, self._weights, self.activation)
        return made.steps(block, self.buffers, self.normed, self.branch)

    def _linear(self, block: BlockSpec, role: str, shape: tuple[int, int], *, bias: bool = True) -> _native.Linear:
        return self._weights.linear(block.prefix + _by_role(block, role), shape, bias=bias)


def kept_heads(architecture: GatedDecoder) -> list[tuple[int, int]]:
    """Heads and head_dim of the keys and values that each layer keeps."""
    config: Any = architecture.config
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return [(int(config.num_key_value_heads), head_dim)] * architecture.layers


def _by_role(block: BlockSpec, role: str) -> str:
    """The name of the block's linear for ``role``."""
    return next(linear.name for linear in block.linears if linear.role == role)


def gated_decoder(architecture: GatedDecoder, weights: MappedWeights, threads: int) -> tuple[_native.Decoder, int]:
    """The native decoder of ``architecture``, and the bytes of weights that a token reads.

    Raises ``ValueError`` where shapes disagree.
    """
    made = GatedSteps(architecture, weights)
    config: Any = architecture.config
    layers = [step for index in range(architecture.layers) for step in made.layer(index)]
    table = (config.vocab_size, made.width)
    embedding = weights.matrix(architecture.embedding, table)
    head = weights.linear(architecture.head_owner, table)
    last = made.norm(f"{architecture.final_norm}.weight")
    decoder = _native.Decoder(
        widths=made.buffers.widths,
        layers=kept_heads(architecture),
        rotaries=[frequencies(architecture)],
        steps=[_native.Step.embed(embedding, made.hidden), *layers, last],
        output=made.normed,
        head=head,
        threads=threads,
    )
    return decoder, weights.read_bytes + (0 if architecture.tied else embedding.bytes // config.vocab_size)
