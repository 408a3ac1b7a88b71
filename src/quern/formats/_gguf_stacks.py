"""Experts' matrices in a GGUF: all of a block lie in one tensor, so they have one type; routers are float32."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from quern.architectures.base import Architecture
from quern.checkpoint.gguf.names import ROUTERS, expert_of, gguf_name


def as_stored(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a stage (transformers' names, rows in llama.cpp's order) as they lie in the file, in its order."""
    stacks: dict[str, dict[int, Tensor]] = defaultdict(dict)
    found: dict[str, Tensor | None] = {}
    for name, tensor in tensors.items():
        stored, expert = gguf_name(name), expert_of(name)
        if expert is not None:
            stacks[stored][expert] = tensor
            found[stored] = None
        elif stored.endswith(ROUTERS):
            found[stored] = tensor.float().squeeze(0)  # the gate of a shared expert is a vector
        else:
            found[stored] = tensor
    for stored, plain in found.items():
        yield stored, torch.stack([stacks[stored][e] for e in range(len(stacks[stored]))]) if plain is None else plain


def stored_shape(architecture: Architecture, name: str) -> tuple[int, ...]:
    """The shape of the tensor that the parameter called ``name`` lies in."""
    shapes = architecture.module_shapes()
    if expert_of(name) is None:
        return shapes[name]
    block = next(block for block in architecture.blocks if name.startswith(block.prefix))
    return (block.experts, *shapes[name])


def uneven_stacks(architecture: Architecture, kinds: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Of stacks whose matrices would have several types: what is wrong, and the modules. ``kinds``: types by module."""
    stacks: dict[str, list[str]] = defaultdict(list)
    for module, linear in architecture.linears.items():
        if linear.expert is not None:
            stacks[gguf_name(f"{module}.weight")].append(module)
    for stored, modules in stacks.items():
        found = {kinds.get(module, "no") for module in modules}
        if len(found) > 1:
            yield (
                f"{stored} holds this matrix of all experts in one type, and the recipe gives {' and '.join(sorted(found))}",
                modules,
            )
