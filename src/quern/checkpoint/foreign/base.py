"""What other tools quantized, read as the values that its codes stand for.

A method is recognised by ``quant_method`` in the ``quantization_config`` of config.json. It says which weights it
packed, checks their parts' shapes and dtypes from the headers, and decodes one weight when it is asked for. Adding a
tool is adding one file here: a ``ForeignMethod`` under its ``quant_method``.

Whatever is packed otherwise than the configuration says is refused with a ``BadFileError`` that names the tensor,
what was called for and what came: other shapes or dtypes, parts that are missing, groups or zero points out of range,
scales that are no finite numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quern.checkpoint.checkpoint import TensorSource
from quern.checkpoint.folder import CONFIG
from quern.checkpoint.safetensors_file import DTYPES, TensorInfo, allocate_bytes
from quern.core.errors import BadFileError, UserError
from quern.core.registry import Registry

_HINT = "The weights are not packed as quantization_config says; get them and config.json from the same place again"
SCALES = ("F16", "BF16", "F32")
"""Dtypes that scales are stored in."""


@dataclass(frozen=True, kw_only=True)
class ForeignWeight:
    """One weight that a tool packed."""

    name: str
    """Of the weight that the model has, such as ``model.layers.0.mlp.up_proj.weight``."""
    shape: tuple[int, ...]
    """Of the decoded weight."""
    bits: int
    """Of one code."""
    granularity: str
    """Who shares a scale, as tables show it: ``tensor``, ``channel``, ``group 128``, ``block 128 x 128``."""
    parts: tuple[str, ...]
    """The stored tensors that it is made of, its codes first."""
    dtype: str = "F32"
    """What it is decoded to."""
    settings: Any = None
    """What its method keeps for ``decode``."""


@dataclass(frozen=True)
class Stored:
    """The tensors of a folder as they are stored, for those who decode them."""

    folder: Path
    source: TensorSource

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every stored tensor."""
        return self.source.infos

    def modules(self, part: str) -> list[str]:
        """Names of the modules that have a tensor called ``part``, sorted."""
        ending = f".{part}"
        return sorted(name.removesuffix(ending) for name in self.infos if name.endswith(ending))

    def present(self, *names: str) -> tuple[str, ...]:
        """Those of ``names`` that are stored."""
        return tuple(name for name in names if name in self.infos)

    def expect(self, name: str, shapes: Collection[tuple[int, ...]] | None, dtypes: Collection[str]) -> TensorInfo:
        """The header's entry of a tensor. Raises ``BadFileError`` where it is missing or of another shape or dtype.

        ``shapes`` None: any that multiplies out to at least one number.
        """
        info = self.infos.get(name)
        if info is None:
            raise self.bad(name, _named(shapes, dtypes), "it is missing")
        fits = info.elements > 0 if shapes is None else info.shape in shapes
        if info.dtype not in dtypes or not fits:
            raise self.bad(name, _named(shapes, dtypes), f"it has {info.dtype} {info.shape}")
        return info

    def bad(self, name: str, wanted: str, came: str) -> BadFileError:
        """The error for a stored tensor that is not what its weight needs."""
        place = self.source.place(name) if name in self.infos else self.folder
        return BadFileError(place, f"tensor {name!r} must be {wanted}; {came}", _HINT)

    def read(self, name: str) -> Tensor:
        """A stored tensor."""
        return self.source.read(name)

    def array(self, name: str) -> NDArray[Any]:
        """A stored tensor that numpy has a dtype for; of FP8 the bytes."""
        tensor = self.read(name)
        return (tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor).numpy()

    def numbers(self, name: str) -> NDArray[np.float32]:
        """A stored tensor of floats, as float32. Raises ``BadFileError`` where one of them is not finite."""
        values = self.read(name).float().numpy()
        if count := int(values.size - np.isfinite(values).sum()):
            raise self.bad(name, "finite numbers", f"{count} of its {values.size} are NaN or infinite")
        return values

    def allocate(self, weight: ForeignWeight) -> Tensor:
        """Uninitialized memory for a decoded weight. Raises ``UserError`` where the machine has not so much."""
        dtype = DTYPES[weight.dtype]
        place = self.source.place(weight.parts[0])
        return allocate_bytes(place, prod(weight.shape) * dtype.itemsize).view(dtype).view(weight.shape)


def _named(shapes: Collection[tuple[int, ...]] | None, dtypes: Collection[str]) -> str:
    where = "" if shapes is None else f" {' or '.join(map(str, shapes))}"
    return f"{' or '.join(dtypes)}{where}"


class ForeignMethod(ABC):
    """How one tool packs weights. Made from its ``quantization_config``; raises ``UserError`` for what is not read."""

    tool: ClassVar[str]
    """What people call it."""

    def __init__(self, config: Mapping[str, Any], stored: Stored) -> None:
        self.config, self.stored = config, stored

    @abstractmethod
    def weights(self) -> Iterable[ForeignWeight]:
        """Every weight that is packed; their parts' shapes and dtypes are checked. Raises ``BadFileError``."""

    @abstractmethod
    def decode(self, weight: ForeignWeight) -> Tensor:
        """The values of one weight, in its dtype and shape, in fresh memory.

        Apart from the result: memory for the parts and some million numbers. Raises ``BadFileError`` for parts whose
        values make no sense.
        """

    def notes(self) -> list[str]:
        """What of the checkpoint is not taken over."""
        return []

    def refuse(self, problem: str) -> BadFileError:
        """The error for a configuration that says what the tool does not do."""
        return BadFileError(self.stored.folder / CONFIG, f"its quantization_config {problem}", _HINT)

    def unsupported(self, what: str, read: str) -> UserError:
        """The error for what the tool does and nobody here reads."""
        return UserError(
            f"{self.stored.folder}: {what} of {self.tool} is not read; {read} is. Give the unquantized checkpoint"
        )

    def integer(self, key: str, allowed: Collection[int] | None, default: int | None = None) -> int:
        """An integer of the configuration: one of ``allowed``, or -1 or any positive one where that is None."""
        value = self.config.get(key, default)
        if type(value) is int and (value in allowed if allowed is not None else value == -1 or 0 < value < 2**31):
            return value
        what = "-1 or a positive integer" if allowed is None else " or ".join(map(str, sorted(allowed)))
        raise self.refuse(f"has {key} {repr(value)[:40]}; {self.tool} knows {what}")

    def flag(self, key: str, default: bool) -> bool:
        """A truth value of the configuration."""
        value = self.config.get(key, default)
        if isinstance(value, bool):
            return value
        raise self.refuse(f"has {key} {repr(value)[:40]}, which must be true or false")


FOREIGN: Registry[type[ForeignMethod]] = Registry("quantization method", "quern.checkpoint.foreign")


def known_methods() -> Iterator[tuple[str, str]]:
    """The ``quant_method`` and the tool of everything that is read."""
    return ((name, FOREIGN.get(name).tool) for name in FOREIGN)


def group_count(size: int, group: int) -> int:
    """How many groups of ``group`` (-1: one of all) cover ``size`` numbers; the last one may be shorter."""
    return 1 if group == -1 else -(-size // group)


def named_group(group: int) -> str:
    """How tables name groups of that size."""
    return "channel" if group == -1 else f"group {group}"


def in_order(size: int, group: int) -> NDArray[np.int64]:
    """The group of each of ``size`` numbers where groups follow each other."""
    return np.zeros(size, np.int64) if group == -1 else np.arange(size) // group
