"""Architectures: what quantization must know of a model family, declared as data and asked for block by block.

A family says which linears a decoder block has, which of them read the same input (and so share statistics), which
rescalings leave the function unchanged, and where each weight lies in a checkpoint. Blocks may differ: in shapes, in the
kind of attention, dense or routed to experts. The algorithms only walk these declarations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from quern.core.errors import UserError
from quern.core.registry import Registry

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Source:
    """Where the numbers of a parameter lie in a checkpoint."""

    tensor: str
    """Full name of the stored tensor."""
    index: int | None = None
    """Of a stack along the first dimension, as experts are stored; None for the tensor itself."""
    rows: tuple[int, int] | None = None
    """``[start, stop)`` of the rows, where several linears are stored as one matrix; None for all."""

    def cut(self, stored: Tensor) -> Tensor:
        """The part of the stored tensor that is meant."""
        part = stored if self.index is None else stored[self.index]
        return part if self.rows is None else part[slice(*self.rows)]


@dataclass(frozen=True)
class Layout:
    """How a checkpoint holds the parameters of a model."""

    sources: Mapping[str, Source]
    """By full name of a parameter, where its numbers lie if not in the tensor of its name."""
    shapes: Shapes
    """Every tensor that the checkpoint must have."""


@dataclass(frozen=True)
class LinearSpec:
    """One linear of a decoder block."""

    name: str
    """Relative to the block, as its module is called."""
    shape: tuple[int, int]
    """(output, input) features."""
    role: str
    """What it is for: query, key, value, output, gate, up, down, router ..."""
    input_group: str
    """Name shared by the linears that read the same input."""
    expert: int | None = None
    """Number of the expert that it belongs to; None where every token meets it."""
    fused_with: tuple[str, ...] = ()
    """The linears, itself included, that runtimes join into one matrix, so that they want one scheme; empty: none."""
    added_to: str | None = None
    """The module of the block (a norm) whose input its outputs are added to; None where they are not just added."""


@dataclass(frozen=True)
class LinearGroup:
    """Linears of a block that read the same input."""

    name: str
    linears: tuple[str, ...]


@dataclass(frozen=True)
class Rescaling:
    """Dividing the source's outputs by s and multiplying the targets' input columns by s changes nothing.

    ``norm``: the source is an RMSNorm weight. ``linear``: the source is a linear (rows and bias are divided).
    ``value``: the source is the value projection, of which one head feeds several heads of the target under grouped-query
    attention; s has one entry for each value channel and is repeated for the target.
    """

    kind: Literal["norm", "linear", "value"]
    source: str
    targets: tuple[str, ...]
    heads: int = 1
    """Heads of the source (1 where source and target channels are the same)."""
    times: int = 1
    """Heads of the target that each head of the source feeds."""


@dataclass(frozen=True)
class BlockSpec:
    """A decoder block: its linears in the order in which data flows through them."""

    index: int
    prefix: str
    """What the full names of its tensors begin with."""
    linears: tuple[LinearSpec, ...]
    rescalings: tuple[Rescaling, ...] = ()
    window: int = 0
    """How many positions its attention sees back, itself included; 0: all."""
    experts_per_token: int = 0
    """Experts that a token meets; 0 in a dense block."""
    router: str | None = None
    """The module whose inputs experts read and whose first output are logits ``(tokens, experts)``. The module that holds an
    expert's linears computes the expert: hidden states ``(n, width)`` of any tokens -> ``(n, width)``."""
    sources: dict[str, tuple[Source, ...]] = field(default_factory=dict)
    """By parameter, relative to the block: what its rows are joined from, where that is not the tensor of its name."""

    @cached_property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The linears by input group."""
        return tuple(
            LinearGroup(name, tuple(linear.name for linear in linears))
            for name, linears in groupby(self.linears, lambda linear: linear.input_group)
        )

    @cached_property
    def stages(self) -> tuple[tuple[LinearGroup, ...], ...]:
        """Groups that are calibrated together because none reads what another makes: the experts' of one role."""
        role = {linear.name: (linear.role if linear.expert is not None else linear.name) for linear in self.linears}
        return tuple(tuple(groups) for _, groups in groupby(self.groups, lambda group: role[group.linears[0]]))

    @cached_property
    def experts(self) -> int:
        """How many experts it has; 0 in a dense block."""
        return len({linear.expert for linear in self.linears} - {None})

    def linear(self, name: str) -> LinearSpec:
        """The linear called ``name``, relative to the block."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, LinearSpec]:
        return {linear.name: linear for linear in self.linears}

    def sources_of(self, parameter: str) -> tuple[Source, ...]:
        """What makes up the parameter of that name, relative to the block."""
        return self.sources.get(parameter) or (Source(self.prefix + parameter),)


class Architecture(ABC):
    """A family of decoder-only models, as its config describes one."""

    model_type: ClassVar[str]
    renamed: ClassVar[bool] = False
    """Whether checkpoints and runtimes call linears otherwise than transformers' modules, after which quern calls them."""

    embedding = "model.embed_tokens"
    final_norm = "model.norm"
    head = "lm_head"

    def __init__(self, config: dict[str, Any]) -> None:
        from transformers import AutoConfig

        values = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
        self.config = AutoConfig.for_model(self.model_type, **values)
        self.config._attn_implementation = "sdpa"
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
            value = getattr(self.config, key, None)
            if not isinstance(value, int) or value <= 0:
                raise UserError(f"config.json: {key} must be a positive integer, got {value!r}")
        self._parameters: dict[Hashable, Shapes] = {}

    @property
    def layers(self) -> int:
        """Number of decoder blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return bool(self.config.tie_word_embeddings)

    @property
    def head_owner(self) -> str:
        """The module that holds the output head's weight."""
        return self.embedding if self.tied else self.head

    def block_prefix(self, index: int) -> str:
        """What the names of block ``index`` start with."""
        return f"model.layers.{index}."

    @abstractmethod
    def block(self, index: int) -> BlockSpec:
        """What block ``index`` is made of."""

    @cached_property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """All blocks in order."""
        return tuple(self.block(index) for index in range(self.layers))

    @cached_property
    def linears(self) -> dict[str, LinearSpec]:
        """The linears of all blocks by full name, in order."""
        return {block.prefix + linear.name: linear for block in self.blocks for linear in block.linears}

    @cached_property
    def never_quantized(self) -> tuple[str, ...]:
        """Full names of modules in blocks that hold a matrix and are no linears of ``linears``: routers and gates."""
        names = (
            block.prefix + name.removesuffix(".weight")
            for block in self.blocks
            for name, shape in self.parameters(block.index).items()
            if name.endswith(".weight") and len(shape) == 2
        )
        return tuple(name for name in names if name not in self.linears)

    @property
    def outer(self) -> tuple[str, ...]:
        """Full names of the matrices outside of the blocks: the embedding and, where it has weights of its own, the head."""
        return (self.embedding,) if self.tied else (self.embedding, self.head)

    def kind_of(self, index: int) -> Hashable:
        """Blocks of equal kind have the same parameters. A family whose blocks are alike says so by one value for all."""
        return index

    def parameters(self, index: int) -> Shapes:
        """Shapes of the parameters of block ``index`` by name, relative to the block."""
        kind = self.kind_of(index)
        if kind not in self._parameters:
            with torch.device("meta"):
                named = self.build_block(index).named_parameters()
                self._parameters[kind] = {name: tuple(parameter.shape) for name, parameter in named}
        return self._parameters[kind]

    @abstractmethod
    def build_block(self, index: int) -> nn.Module:
        """A decoder block on the device that is current (``meta`` for no memory): transformers' own class, or one that
        computes the same with an ``nn.Linear`` for each declared linear."""

    @abstractmethod
    def build_rotary(self) -> nn.Module:
        """The rotary embedding: ``(hidden, position_ids) -> (cos, sin)``."""

    @abstractmethod
    def build_norm(self) -> nn.Module:
        """The final norm."""

    def build_model(self, dtype: torch.dtype) -> Any:
        """transformers' model without memory, its blocks as ``build_block`` makes them."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        self.adapt(model)
        return model

    def adapt(self, model: Any) -> None:  # noqa: B027 - most families have nothing to replace
        """Replace in transformers' model, which has no memory yet, what ``build_block`` makes otherwise."""

    def module_shapes(self) -> Shapes:
        """Every parameter of the model by full name, as its modules hold it."""
        return dict(self._module_shapes)

    @cached_property
    def _module_shapes(self) -> Shapes:
        hidden, vocabulary = self.config.hidden_size, self.config.vocab_size
        shapes: Shapes = {f"{self.embedding}.weight": (vocabulary, hidden), f"{self.final_norm}.weight": (hidden,)}
        if not self.tied:
            shapes[f"{self.head}.weight"] = (vocabulary, hidden)
        for index in range(self.layers):
            prefix = self.block_prefix(index)
            shapes |= {prefix + name: shape for name, shape in self.parameters(index).items()}
        return shapes

    def expected_shapes(self) -> Shapes:
        """Every tensor that the checkpoint must have, with its shape. A family that stores stacks says theirs."""
        return self.module_shapes()

    def layout(self, names: Collection[str]) -> Layout:
        """How a checkpoint with tensors of these names holds the parameters, for families whose checkpoints come in several
        ways. Raises ``UserError`` where the names are of two ways."""
        return Layout({}, self.expected_shapes())

    def sources_of(self, name: str) -> tuple[Source, ...]:
        """What makes up the parameter of that full name in a checkpoint."""
        for block in self._moved:
            if name.startswith(block.prefix):
                return block.sources_of(name.removeprefix(block.prefix))
        return (Source(name),)

    @cached_property
    def _moved(self) -> tuple[BlockSpec, ...]:
        """The blocks with parameters that lie elsewhere than their names say."""
        return tuple(block for block in self.blocks if block.sources)


def parameter_reader(read: Callable[[str], Tensor]) -> Callable[[tuple[Source, ...]], Tensor]:
    """A function that joins a parameter from its sources. A stored tensor is kept until another one is wanted, so that the
    linears of a stack, asked for one after the other, read it once."""
    kept: dict[str, Tensor] = {}

    def stored(name: str) -> Tensor:
        if name not in kept:
            kept.clear()
            kept[name] = read(name)
        return kept[name]

    def joined(sources: tuple[Source, ...]) -> Tensor:
        if len(sources) == 1 and sources[0].index is None and sources[0].rows is None:
            kept.clear()
            return read(sources[0].tensor)
        parts = [source.cut(stored(source.tensor)).clone() for source in sources]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return joined


ARCHITECTURES: Registry[type[Architecture]] = Registry("architecture", "quern.architectures")


def architecture_of(config: dict[str, Any]) -> Architecture:
    """The architecture that ``config`` (config.json) describes. Raises ``UserError`` with the known ones."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES.names():
        known = ", ".join(ARCHITECTURES.names())
        raise UserError(f"config.json: model_type {model_type!r} is not supported; supported: {known}")
    try:
        architecture = ARCHITECTURES.get(model_type)(config)
        _ = architecture.blocks  # not in an assertion, which python -O leaves out
        architecture.build_rotary()
        return architecture
    except UserError:
        raise
    except Exception as error:  # transformers' classes raise many kinds for values that make no sense
        raise UserError(f"config.json: not a usable {model_type} configuration: {error}") from None
