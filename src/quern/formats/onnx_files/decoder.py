"""A decoder of Llama's layout as an ONNX graph, with keys and values as optimum and onnxruntime-genai name them.

Inputs: ``input_ids``, ``attention_mask`` and ``position_ids``, int64 ``(batch, time)``, the mask over past and present;
``past_key_values.N.key`` and ``.value``, float32 ``(batch, heads, past, head size)``. Outputs: ``logits`` float32 ``(batch,
time, vocabulary)``; ``present.N.key`` and ``.value``. The past may be a buffer with room for more, which is then extended in
place: the mask says how much of it counts (``GroupQueryAttention``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quern.architectures.base import BlockSpec
from quern.architectures.gated_decoder import ATTENTION, OUTPUT, GatedDecoder
from quern.architectures.rotary import frequencies
from quern.core.plan import KEPT, Plan
from quern.formats.onnx_files.graph import CONTRIB, TYPES, Dimension, Graph
from quern.formats.onnx_files.products import Held, Names, Products

BATCH, TIME, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
INPUTS = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "position_ids": "position_ids",
    "past_key_names": "past_key_values.%d.key",
    "past_value_names": "past_key_values.%d.value",
}
LOGITS = "logits"
OUTPUTS = {LOGITS: LOGITS, "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
NORMS = ("input_layernorm", "post_attention_layernorm")
GATE, UP, DOWN = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"


class Decoder:
    """Adds a model to ``graph`` in the order of its stages: ``begin``, ``block`` by block, ``end``."""

    def __init__(self, graph: Graph, architecture: GatedDecoder, plan: Plan, accuracy_level: int) -> None:
        self.graph, self.architecture, self.plan = graph, architecture, plan
        self.config = architecture.config
        self.heads, self.key_heads = int(self.config.num_attention_heads), int(self.config.num_key_value_heads)
        self.head_size = head_size(architecture)
        self._products = Products(graph, accuracy_level)
        self._shapes = architecture.module_shapes()
        self._embedding: Names = {}

    def begin(self, tensors: Held) -> None:
        """Inputs and embedding."""
        graph, integers = self.graph, torch.int64
        ids = graph.input("input_ids", integers, [BATCH, TIME])
        mask = graph.input("attention_mask", integers, [BATCH, TOTAL])
        positions = graph.input("position_ids", integers, [BATCH, TIME])
        graph.output(LOGITS, torch.float32, [BATCH, TIME, int(self.config.vocab_size)])
        self._lengths(mask)
        self._rotary(positions)
        module = self.architecture.embedding
        self._embedding = self._products.store(module, tensors)
        self.hidden = self._products.embedding(module, self._shape(module), self.plan[module], self._embedding, ids)

    def _lengths(self, mask: str) -> None:
        """What ``GroupQueryAttention`` is told: int32 ``(batch,)`` valid tokens less one, and the mask's length."""
        graph, short = self.graph, TYPES[torch.int32]
        valid = graph.node("ReduceSum", [mask, graph.integers([1])], mask, keepdims=0)
        last = graph.node("Sub", [valid, graph.integers([1])], mask)
        self._last = graph.node("Cast", [last], f"{mask}.last", to=short)
        total = graph.node("Gather", [graph.node("Shape", [mask], mask), graph.constant(torch.tensor(1))], mask, axis=0)
        self._total = graph.node("Cast", [total], f"{mask}.total", to=short)

    def _rotary(self, positions: str) -> None:
        """Cosines and sines float32 ``(batch * time, head size / 2)`` of the given positions, and which row is whose.

        They are computed of the frequencies in every run, so that no table limits or enlarges the model.
        """
        graph, ((found, *_), factor) = self.graph, frequencies(self.architecture)
        flat = graph.node("Reshape", [positions, graph.integers([-1, 1])], "rotary.positions")
        times = graph.node("Cast", [flat], "rotary.positions", to=TYPES[torch.float32])
        angles = graph.node("Mul", [times, graph.constant(torch.tensor([found]))], "rotary.angles")
        tables = [graph.node(operator, [angles], "rotary") for operator in ("Cos", "Sin")]
        if factor != 1:
            scale = graph.constant(torch.tensor(factor))
            tables = [graph.node("Mul", [table, scale], f"{table}.scaled") for table in tables]
        self._tables = tables
        ends = [
            graph.constant(torch.tensor(0)),
            graph.node("Size", [positions], "rotary"),
            graph.constant(torch.tensor(1)),
        ]
        count = graph.node("Range", ends, "rotary")
        shape = graph.node("Shape", [positions], "rotary.shape")
        self._rows = graph.node("Reshape", [count, shape], "rotary.rows")

    def block(self, index: int, tensors: Held) -> None:
        """One decoder block."""
        block, graph = self.architecture.blocks[index], self.graph
        inner = self._norm(block.prefix + NORMS[0], tensors, self.hidden)
        query, key, value = (self._linear(block.prefix + name, tensors, inner) for name in ATTENTION)
        query = self._turned(block.prefix + "self_attn.q_norm", tensors, query, self.heads)
        key = self._turned(block.prefix + "self_attn.k_norm", tensors, key, self.key_heads)
        attended = self._linear(block.prefix + OUTPUT, tensors, self._attention(block, query, key, value))
        middle = graph.node("Add", [self.hidden, attended], block.prefix + "attention")
        inner = self._norm(block.prefix + NORMS[1], tensors, middle)
        gate, up = (self._linear(block.prefix + name, tensors, inner) for name in (GATE, UP))
        share = graph.node("Sigmoid", [gate], block.prefix + "gate")
        opened = graph.node("Mul", [gate, share], block.prefix + "gate")
        both = graph.node("Mul", [opened, up], block.prefix + "mlp")
        down = self._linear(block.prefix + DOWN, tensors, both)
        self.hidden = graph.node("Add", [middle, down], block.prefix + "mlp")

    def _attention(self, block: BlockSpec, query: str, key: str, value: str) -> str:
        graph, kinds = self.graph, ("key", "value")
        before: Sequence[Dimension] = [BATCH, self.key_heads, PAST, self.head_size]
        after: Sequence[Dimension] = [BATCH, self.key_heads, TOTAL, self.head_size]
        past = [graph.input(INPUTS[f"past_{kind}_names"] % block.index, torch.float32, before) for kind in kinds]
        present = [OUTPUTS[f"present_{kind}_names"] % block.index for kind in kinds]
        for name in present:
            graph.output(name, torch.float32, after)
        output = f"{block.prefix}self_attn/GroupQueryAttention"
        choices = {"num_heads": self.heads, "kv_num_heads": self.key_heads}
        if block.window:
            choices["local_window_size"] = block.window
        operands = [query, key, value, *past, self._last, self._total]
        graph.nodes("GroupQueryAttention", operands, [output, *present], domain=CONTRIB, **choices)
        return output

    def _turned(self, norm: str, tensors: Held, values: str, heads: int) -> str:
        """Queries or keys, by the norm of every head where the family has one, turned by their positions."""
        graph = self.graph
        if f"{norm}.weight" in tensors:
            by_head = graph.node("Reshape", [values, graph.integers([0, 0, heads, self.head_size])], f"{norm}.heads")
            normed = self._norm(norm, tensors, by_head)
            values = graph.node("Reshape", [normed, graph.integers([0, 0, heads * self.head_size])], norm)
        operands = [values, self._rows, *self._tables]
        return graph.node("RotaryEmbedding", operands, values, domain=CONTRIB, num_heads=heads, interleaved=0)

    def _norm(self, module: str, tensors: Held, values: str) -> str:
        """Root mean square normalization, weight last."""
        weight = self._products.store(module, tensors)["weight"]
        epsilon = float(self.config.rms_norm_eps)
        return self.graph.node("RMSNormalization", [values, weight], module, axis=-1, epsilon=epsilon, stash_type=1)

    def _linear(self, module: str, tensors: Held, inputs: str) -> str:
        names = self._products.store(module, tensors)
        return self._products.linear(module, self._shape(module), self.plan[module], names, inputs)

    def end(self, tensors: Held) -> None:
        """Final norm and head."""
        architecture = self.architecture
        hidden = self._norm(architecture.final_norm, tensors, self.hidden)
        owner, head = architecture.head_owner, architecture.head
        names = self._embedding if architecture.tied else self._products.store(head, tensors)
        logits = self._products.linear(head, self._shape(owner), self.plan.get(owner, KEPT), names, hidden)
        self.graph.nodes("Identity", [logits], [LOGITS])

    def _shape(self, module: str) -> tuple[int, int]:
        rows, columns = self._shapes[f"{module}.weight"]
        return rows, columns


def head_size(architecture: GatedDecoder) -> int:
    """Channels of an attention head."""
    rows, _ = architecture.module_shapes()[f"{architecture.block_prefix(0)}{ATTENTION[0]}.weight"]
    return int(rows // architecture.config.num_attention_heads)
