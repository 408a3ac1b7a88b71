"""Families of models as lists of native steps: all that the CPU engine knows of their layers.

Steps read and write buffers, which have a row of numbers for each token (csrc/engine/steps.h). A layer may look like
no other: each is described by its index.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quern import _native
from quern.architectures._decoder import GatedDecoder
from quern.engines._cpu_weights import MappedWeights
from quern.engines._rotary import frequencies

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


class Buffers:
    """Buffers by name and width; layers that ask for the same share it."""

    def __init__(self) -> None:
        self._indices: dict[tuple[str, int], int] = {}

    def of(self, name: str, width: int) -> int:
        """The index of the buffer called ``name`` with ``width`` numbers a token."""
        return self._indices.setdefault((name, width), len(self._indices))

    @property
    def widths(self) -> list[int]:
        """Of all buffers that were asked for, by index."""
        return [width for _, width in self._indices]


class GatedSteps:
    """The steps of the layout that the Llama family and its descendants share.

    ``scale_per_token``: whether the blocks were made for int8 activations with one scale a token.
    """

    def __init__(self, architecture: GatedDecoder, weights: MappedWeights, scale_per_token: bool) -> None:
        config = architecture.config
        self._architecture, self._weights, self._scale_per_token = architecture, weights, scale_per_token
        self.buffers = Buffers()
        self.epsilon = float(config.rms_norm_eps)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.windows = architecture.windows()
        self.width, self.inner = int(config.hidden_size), int(config.intermediate_size)
        self.heads, self.key_value_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.head_dim = int(getattr(config, "head_dim", None) or self.width // self.heads)
        self.hidden, self.normed = self.buffers.of("hidden", self.width), self.buffers.of("normed", self.width)
        self.branch = self.buffers.of("branch", self.width)
        self._by_role = {role: name for name, role in architecture.roles.items()}

    def layer(self, index: int) -> list[_native.Step]:
        """Attention and gated MLP of layer ``index``, a norm before each."""
        step, prefix = _native.Step, self._architecture.block_prefix(index)
        return [
            self.norm(f"{prefix}input_layernorm.weight"),
            *self.attention(index, prefix),
            step.add(self.branch, self.hidden),
            self.norm(f"{prefix}post_attention_layernorm.weight"),
            *self.gated(prefix),
            step.add(self.branch, self.hidden),
        ]

    def norm(self, name: str) -> _native.Step:
        """What a block reads: the hidden states through the norm called ``name``."""
        return _native.Step.norm(self.hidden, self.normed, self._weights.vector(name, self.width), self.epsilon)

    def attention(self, index: int, prefix: str) -> list[_native.Step]:
        """From the normed hidden states to what attention adds to them."""
        size, step = self.head_dim, _native.Step
        width, key_width = self.heads * size, self.key_value_heads * size
        query, attended = self.buffers.of("query", width), self.buffers.of("attended", width)
        key, value = self.buffers.of("key", key_width), self.buffers.of("value", key_width)
        query_norm = self._weights.optional_vector(f"{prefix}self_attn.q_norm.weight", size)
        key_norm = self._weights.optional_vector(f"{prefix}self_attn.k_norm.weight", size)
        # An int8 cache holds keys without their bias (csrc/engine/cache.h); what a norm made of it cannot be taken away.
        apart = key_norm is None
        linears = [
            self._linear(prefix, "query", (width, self.width)),
            self._linear(prefix, "key", (key_width, self.width), bias=not apart),
            self._linear(prefix, "value", (key_width, self.width)),
        ]
        key_bias = self._weights.optional_vector(f"{prefix}{self._by_role['key']}.bias", key_width) if apart else None
        return [
            step.project(self.normed, linears, [query, key, value]),
            *([] if query_norm is None else [step.norm(query, query, query_norm, self.epsilon)]),
            *([] if key_norm is None else [step.norm(key, key, key_norm, self.epsilon)]),
            step.rotate(query, scale=float(np.float32(1) / np.sqrt(np.float32(size)))),
            step.store(index, key, value, key_bias),
            step.attend(index, query, attended, self.windows[index], key_bias),
            step.project(attended, [self._linear(prefix, "output", (self.width, width))], [self.branch]),
        ]

    def gated(self, prefix: str) -> list[_native.Step]:
        """From the normed hidden states to what the MLP adds to them."""
        gate, up = self.buffers.of("gate", self.inner), self.buffers.of("up", self.inner)
        wide = [self._linear(prefix, role, (self.inner, self.width)) for role in ("gate", "up")]
        return [
            _native.Step.project(self.normed, wide, [gate, up]),
            _native.Step.activate(self.activation, gate, up),
            _native.Step.project(gate, [self._linear(prefix, "down", (self.width, self.inner))], [self.branch]),
        ]

    def _linear(self, prefix: str, role: str, shape: tuple[int, int], *, bias: bool = True) -> _native.Linear:
        name = prefix + self._by_role[role]
        return self._weights.linear(name, shape, scale_per_token=self._scale_per_token, bias=bias)


def gated_decoder(
    architecture: GatedDecoder, weights: MappedWeights, scale_per_token: bool, threads: int
) -> tuple[_native.Decoder, int]:
    """The native decoder of ``architecture``, and the bytes of weights that a token reads.

    Raises ``ValueError`` where shapes disagree.
    """
    made = GatedSteps(architecture, weights, scale_per_token)
    config: Any = architecture.config
    layers = [step for index in range(architecture.layers) for step in made.layer(index)]
    table = (config.vocab_size, made.width)
    embedding = weights.matrix(architecture.embedding, table)
    head_name = architecture.embedding if architecture.tied else architecture.head
    head = weights.linear(head_name, table, scale_per_token=False)
    last = made.norm(f"{architecture.final_norm}.weight")
    decoder = _native.Decoder(
        widths=made.buffers.widths,
        layers=[(made.key_value_heads, made.head_dim)] * architecture.layers,
        rotaries=[frequencies(architecture)],
        steps=[_native.Step.embed(embedding, made.hidden), *layers, last],
        output=made.normed,
        head=head,
        threads=threads,
    )
    return decoder, weights.read_bytes + (0 if architecture.tied else embedding.bytes // config.vocab_size)
