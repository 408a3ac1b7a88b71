"""Architectures: what quantization must know of a model family, declared as data.

A family says which linears a decoder block has, which of them read the same input (and so share statistics), and which
rescalings leave the function unchanged. The algorithms only walk these declarations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from quern.core.errors import UserError
from quern.core.registry import Registry

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class LinearGroup:
    """Linears of a block that read the same input, in the order in which the block computes the groups."""

    name: str
    linears: tuple[str, ...]


@dataclass(frozen=True)
class Rescaling:
    """Dividing the source's outputs by s and multiplying the targets' input columns by s changes nothing.

    ``norm``: the source is an RMSNorm weight. ``linear``: the source is a linear (rows and bias are divided).
    ``value``: the source is the value projection; under grouped-query attention one of its heads feeds several heads of
    the target, so that s has one entry for each value channel and is repeated for the target.
    """

    kind: Literal["norm", "linear", "value"]
    source: str
    targets: tuple[str, ...]


class Architecture(ABC):
    """A family of decoder-only models, as its config describes one."""

    model_type: ClassVar[str]
    groups: ClassVar[tuple[LinearGroup, ...]]
    rescalings: ClassVar[tuple[Rescaling, ...]]
    roles: ClassVar[dict[str, str]]
    """What each linear is for: query, key, value, output, gate, up, down."""

    embedding = "model.embed_tokens"
    final_norm = "model.norm"
    head = "lm_head"

    def __init__(self, config: dict[str, Any]) -> None:
        from transformers import AutoConfig

        self.raw_config = config
        values = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
        self.config = AutoConfig.for_model(self.model_type, **values)
        self.config._attn_implementation = "sdpa"
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
            value = getattr(self.config, key, None)
            if not isinstance(value, int) or value <= 0:
                raise UserError(f"config.json: {key} must be a positive integer, got {value!r}")

    @property
    def layers(self) -> int:
        """Number of decoder blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return bool(self.config.tie_word_embeddings)

    def block_prefix(self, index: int) -> str:
        """What the names of block ``index`` start with."""
        return f"model.layers.{index}."

    def windows(self) -> list[int]:
        """For each block, how many positions its attention sees back, itself included; 0: all. Families may say more."""
        return [0] * self.layers

    def linears(self) -> Iterator[str]:
        """Names of a block's linears, relative to the block."""
        for group in self.groups:
            yield from group.linears

    @abstractmethod
    def build_block(self, index: int) -> nn.Module:
        """A decoder block of transformers' own class, on the device that is current (``meta`` for no memory)."""

    @abstractmethod
    def build_rotary(self) -> nn.Module:
        """The rotary embedding: ``(hidden, position_ids) -> (cos, sin)``."""

    @abstractmethod
    def build_norm(self) -> nn.Module:
        """The final norm."""

    def expected_shapes(self) -> Shapes:
        """Every tensor that the checkpoint must have, with its shape."""
        hidden, vocabulary = self.config.hidden_size, self.config.vocab_size
        with torch.device("meta"):
            block = {name: tuple(p.shape) for name, p in self.build_block(0).named_parameters()}
        shapes: Shapes = {f"{self.embedding}.weight": (vocabulary, hidden), f"{self.final_norm}.weight": (hidden,)}
        if not self.tied:
            shapes[f"{self.head}.weight"] = (vocabulary, hidden)
        for index in range(self.layers):
            shapes |= {self.block_prefix(index) + name: shape for name, shape in block.items()}
        return shapes


ARCHITECTURES: Registry[type[Architecture]] = Registry("architecture", "quern.architectures")


def architecture_of(config: dict[str, Any]) -> Architecture:
    """The architecture that ``config`` (config.json) describes. Raises ``UserError`` with the known ones."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES.names():
        known = ", ".join(ARCHITECTURES.names())
        raise UserError(f"config.json: model_type {model_type!r} is not supported; supported: {known}")
    try:
        architecture = ARCHITECTURES.get(model_type)(config)
        with torch.device("meta"):
            architecture.build_block(0)
        architecture.build_rotary()
        return architecture
    except UserError:
        raise
    except Exception as error:  # transformers' classes raise many kinds for values that make no sense
        raise UserError(f"config.json: not a usable {model_type} configuration: {error}") from None
