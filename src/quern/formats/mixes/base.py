"""Mixes: which linear gets which of ggml's block types, by rules of llama.cpp that know layer, depth and attention heads.

llama.cpp's file types (``Q4_K_M``) are names of such rules (``llama_tensor_get_type`` in ``src/llama-quant.cpp`` of
https://github.com/ggml-org/llama.cpp). A mix is one entry of a module in this folder: its usual type, and rules of which the
last one that a linear meets decides. A recipe names it (``mix: q4_k_m``); for a model it becomes an ordinary recipe, with
an override for each linear that differs from the usual.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quern.checkpoint.gguf.names import FAMILIES
from quern.core.recipe import MIXES, Override, Recipe
from quern.core.scheme import CodecScheme, parse_scheme

if TYPE_CHECKING:
    from quern.architectures.base import Architecture

Experts = Callable[[int], bool]
"""Whether a rule holds in a model of so many experts; 0: without any."""
Layers = Callable[[int, int], bool]
"""Whether a rule holds in the layer of an index, out of so many."""
_WIDE_VALUES = {"q3_k": "q5_k", "q4_k": "q5_k"}
_WIDE_LAYERS = 80


def every(index: int, layers: int) -> bool:
    """All layers."""
    return True


def more_bits(index: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third of those between: llama.cpp's ``use_more_bits``."""
    return index < layers // 8 or index >= 7 * layers // 8 or (index - layers // 8) % 3 == 2


def middle(index: int, layers: int) -> bool:
    """All but the first and last eighth of the layers."""
    return layers // 8 <= index < 7 * layers // 8


def first_of(part: int) -> Layers:
    """The first ``1 / part`` of the layers, rounded down."""
    return lambda index, layers: index < layers // part


def first(count: int) -> Layers:
    """The first ``count`` layers."""
    return lambda index, layers: index < count


def any_number(experts: int) -> bool:
    """All models."""
    return True


def eight(experts: int) -> bool:
    """Models of eight experts, as Mixtral has, whose attention is a small part."""
    return experts == 8


def four_or_more(experts: int) -> bool:
    """Models of at least four experts."""
    return experts >= 4


@dataclass(frozen=True)
class Rule:
    """Linears that get another type than the usual."""

    role: str
    """Of the linears (``LinearSpec.role``)."""
    type: str
    """Name of ggml's block type, as codec ``ggml`` has it."""
    layers: Layers = every
    sharing: int = 1
    """Least number of query heads that share a value head, for the rule to hold."""
    experts: Experts = any_number


WIDE_KEYS = (Rule("value", "q8_0", experts=eight), Rule("key", "q8_0", experts=eight))
"""Of all mixes but those of two bits: they come last."""
WIDE_OUTPUT = Rule("output", "q5_k", experts=eight)


@dataclass(frozen=True)
class Mix:
    """One of llama.cpp's file types, as llama-quantize carries it out with an importance matrix."""

    usual: str
    """The type of every linear that no rule is for."""
    rules: tuple[Rule, ...] = ()
    """Later ones win."""
    head: str = "q6_k"
    """Of the output head, and of the embedding that is one."""
    embedding: str | None = None
    """Of an embedding that is not the head too; None: the usual type."""
    widens: bool = True
    """Whether values get more than four bits in models that llama.cpp counts among those of 70B parameters."""

    def types(self, architecture: Architecture) -> dict[str, str]:
        """The type of every matrix by full name, embedding and head first. Those whose rows do not fit a type get another
        one afterwards (``Codec.fitting``)."""
        embedding = self.head if architecture.tied else self.embedding or self.usual
        found = {architecture.embedding: embedding} | dict.fromkeys(architecture.outer[1:], self.head)
        sharing, wide = _sharing(architecture), self.widens and _is_wide(architecture)
        experts = len({linear.expert for linear in architecture.linears.values()} - {None})
        for block in architecture.blocks:
            for linear in block.linears:
                fits = (
                    rule.type
                    for rule in reversed(self.rules)
                    if rule.role == linear.role
                    and rule.sharing <= sharing
                    and rule.experts(experts)
                    and rule.layers(block.index, architecture.layers)
                )
                kind = next(fits, self.usual)
                wider = _WIDE_VALUES.get(kind, kind) if wide and linear.role == "value" else kind
                found[block.prefix + linear.name] = wider
        return found


def scheme_of(kind: str) -> CodecScheme:
    """The scheme of a block type."""
    return parse_scheme({"codec": "ggml", "type": kind})


def settled(recipe: Recipe, architecture: Architecture) -> Recipe:
    """``recipe`` for one model: without a mix, whose choices stand as overrides in front of the recipe's own.

    A recipe that names none stays what it is. Raises ``UserError`` for an unknown mix.
    """
    if recipe.mix is None:
        return recipe
    mix: Mix = MIXES.get(recipe.mix)
    types = mix.types(architecture)
    linears = {name: kind for name, kind in types.items() if name in architecture.linears}
    overrides = [Override(pattern=name, scheme=scheme_of(kind)) for name, kind in linears.items() if kind != mix.usual]
    return recipe.model_copy(
        update={
            "mix": None,
            "weights": scheme_of(mix.usual),
            "embedding": scheme_of(types[architecture.embedding]),
            "head": scheme_of(mix.head),
            "overrides": (*overrides, *recipe.overrides),
        }
    )


def _sharing(architecture: Architecture) -> int:
    """Query heads for each value head: llama.cpp's ``n_gqa``."""
    heads = int(architecture.config.num_attention_heads)
    return heads // int(getattr(architecture.config, "num_key_value_heads", None) or heads)


def _is_wide(architecture: Architecture) -> bool:
    """Whether llama.cpp takes the model for one of 70B parameters, which it tells by the number of layers."""
    family = FAMILIES.get(architecture.model_type)
    if family is None or architecture.layers != _WIDE_LAYERS:
        return False
    return family.wide == "always" or (family.wide == "shared" and _sharing(architecture) > 1)
