"""compressed-tensors checkpoints of other tools (llm-compressor and those that export for vLLM).

``config_groups`` say which modules are stored how; a module's tensors are, by format:

- pack-quantized: ``weight_packed`` int32 ``(out, words)``, integers without gaps along the inputs, lowest bits first,
  above zero by 2 ** (bits - 1); ``weight_shape``; ``weight_scale``; for asymmetric ones ``weight_zero_point``, packed
  alike along the outputs
- int-quantized: ``weight`` int8; ``weight_scale``; ``weight_zero_point`` int8
- float-quantized: ``weight`` float8 (E4M3); ``weight_scale``
- nvfp4-pack-quantized: ``weight_packed`` uint8, two FP4 codes a byte, the low one first; ``weight_scale`` float8 for
  16 inputs each; ``weight_global_scale``, by which all are divided
- mxfp4-pack-quantized: the same with ``weight_scale`` uint8, powers of two for 32 inputs each, and nothing else

What becomes of activations is not taken over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from quern.checkpoint.foreign._arithmetic import (
    E8M0_NAN,
    FP4,
    FP8,
    Array,
    fill_scaled,
    powers_of_two,
    unpack_nibbles,
    unpack_words,
    words_for,
)
from quern.checkpoint.foreign.base import FOREIGN, SCALES, ForeignMethod, ForeignWeight, group_count, named_group

_INPUTS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale")
_CODES = ("weight_packed", "weight")
_NVFP4_GROUP, _MXFP4_GROUP = 16, 32


@dataclass(frozen=True)
class _Grid:
    """Who shares a scale: ``height`` outputs and ``width`` inputs."""

    height: int
    width: int
    shape: tuple[int, int]
    """Of the scales."""
    shapes: tuple[tuple[int, ...], ...]
    """Those in which the same scales may be stored."""
    name: str


@dataclass(frozen=True)
class _Settings:
    kind: str
    bits: int
    symmetric: bool
    grid: _Grid


@FOREIGN.add("compressed-tensors")
class CompressedTensors(ForeignMethod):
    """Integers, FP8 and FP4 by scheme."""

    tool = "compressed-tensors"

    def weights(self) -> Iterator[ForeignWeight]:
        for key in ("transform_config", "sparsity_config", "moe_sparsity_config"):
            setting = self.config.get(key)
            if setting and not (isinstance(setting, dict) and setting.get("format") == "dense"):
                raise self.unsupported(f"the setting {key!r}", "a checkpoint without it")
        groups = self._groups()
        for module in self.stored.modules("weight_scale"):
            yield self._weight(module, _arguments(groups, module) or self._uncovered(module))

    def notes(self) -> list[str]:
        if any(group.get("input_activations") for group in self._groups()):
            return ["the scheme rounds the inputs of linears too; the decoded weights are used with inputs as they are"]
        return []

    def _groups(self) -> list[dict[str, Any]]:
        groups = self.config.get("config_groups")
        if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
            raise self.refuse("has no usable config_groups")
        for group in groups.values():
            targets = group.get("targets")
            if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
                raise self.refuse("has a config group without a list of targets")
        return list(groups.values())

    def _uncovered(self, module: str) -> Mapping[str, Any]:
        raise self.refuse(f"has no config group that covers {module!r}, which has a weight_scale")

    def _weight(self, module: str, arguments: Mapping[str, Any]) -> ForeignWeight:
        bits, kind = arguments.get("num_bits", 8), arguments.get("type", "int")
        if (
            kind not in ("int", "float")
            or type(bits) is not int
            or bits not in ((4, 8) if kind == "float" else range(1, 9))
        ):
            raise self.refuse(f"has weights of {str(bits)[:40]} bits and type {str(kind)[:40]} for {module!r}")
        name = next(iter(self.stored.present(*(f"{module}.{part}" for part in _CODES))), f"{module}.weight")
        packed = name.endswith("_packed")
        if kind == "float":
            return (
                self._fp4(module, name, arguments)
                if bits == 4
                else self._unpacked(module, name, bits, arguments, "F8_E4M3")
            )
        return (
            self._integers(module, name, bits, arguments)
            if packed
            else self._unpacked(module, name, bits, arguments, "I8")
        )

    def _integers(self, module: str, name: str, bits: int, arguments: Mapping[str, Any]) -> ForeignWeight:
        shape = self._stated_shape(f"{module}.weight_shape")
        wanted = (shape[0], words_for(shape[1], bits))
        self.stored.expect(name, [wanted], ["I32"])
        grid, symmetric = self._grid(arguments, *shape), arguments.get("symmetric", True) is True
        zero = f"{module}.weight_zero_point"
        if not symmetric:
            self.stored.expect(zero, [(words_for(grid.shape[0], bits), grid.shape[1])], ["I32"])
        return self._made(module, name, shape, _Settings("packed", bits, symmetric, grid), "weight_shape")

    def _unpacked(self, module: str, name: str, bits: int, arguments: Mapping[str, Any], dtype: str) -> ForeignWeight:
        info = self.stored.expect(name, None, [dtype])
        if len(info.shape) != 2:
            raise self.stored.bad(name, "a matrix", f"it has {info.shape}")
        grid = self._grid(arguments, *info.shape)
        symmetric = dtype != "I8" or arguments.get("symmetric", True) is True
        if not symmetric:
            self.stored.expect(f"{module}.weight_zero_point", grid.shapes, ["I8"])
        return self._made(module, name, info.shape, _Settings("plain", bits, symmetric, grid))

    def _fp4(self, module: str, name: str, arguments: Mapping[str, Any]) -> ForeignWeight:
        info = self.stored.expect(name, None, ["U8"])
        if len(info.shape) != 2:
            raise self.stored.bad(name, "a matrix", f"it has {info.shape}")
        shape = (info.shape[0], 2 * info.shape[1])
        powers = self.stored.expect(f"{module}.weight_scale", None, ["F8_E4M3", "U8"]).dtype == "U8"
        group = _MXFP4_GROUP if powers else _NVFP4_GROUP
        if arguments.get("group_size", group) != group:
            raise self.refuse(f"has FP4 weights in groups of {str(arguments.get('group_size'))[:40]} for {module!r}")
        grid = self._grid({"strategy": "group", "group_size": group}, *shape)
        if powers:
            return self._made(module, name, shape, _Settings("mxfp4", 4, True, grid), scales=["U8"])
        self.stored.expect(f"{module}.weight_global_scale", [(), (1,), (1, 1)], ["F32"])
        return self._made(
            module, name, shape, _Settings("nvfp4", 4, True, grid), "weight_global_scale", scales=["F8_E4M3"]
        )

    def _made(
        self, module: str, name: str, shape: tuple[int, ...], settings: _Settings, *more: str, scales: Any = SCALES
    ) -> ForeignWeight:
        self.stored.expect(f"{module}.weight_scale", settings.grid.shapes, scales)
        others = ("weight_scale", *more, "weight_zero_point", "weight_g_idx", *_INPUTS)
        return ForeignWeight(
            name=f"{module}.weight", shape=shape, bits=settings.bits, granularity=settings.grid.name, settings=settings,
            parts=(name, *self.stored.present(*(f"{module}.{part}" for part in others))),
        )  # fmt: skip

    def _stated_shape(self, name: str) -> tuple[int, int]:
        self.stored.expect(name, [(2,), (2, 1), (1, 2)], ["I64", "I32"])
        rows, columns = self.stored.read(name).reshape(-1).tolist()
        if not (0 < rows < 2**31 and 0 < columns < 2**31):
            raise self.stored.bad(name, "two positive sizes", f"it says {rows} and {columns}")
        return rows, columns

    def _grid(self, arguments: Mapping[str, Any], rows: int, columns: int) -> _Grid:
        strategy, group, block = (arguments.get(key) for key in ("strategy", "group_size", "block_structure"))
        if strategy == "tensor":
            return _Grid(rows, columns, (1, 1), ((), (1,), (1, 1)), "tensor")
        if strategy == "channel":
            return _Grid(1, columns, (rows, 1), ((rows, 1), (rows,)), named_group(-1))
        if strategy == "group" and type(group) is int and 0 < group < 2**31:
            shape = (rows, group_count(columns, group))
            return _Grid(1, group, shape, (shape,), named_group(group))
        sizes = block if isinstance(block, list) and len(block) == 2 else [0, 0]
        if strategy == "block" and all(type(size) is int and 0 < size < 2**31 for size in sizes):
            shape = (group_count(rows, sizes[0]), group_count(columns, sizes[1]))
            return _Grid(sizes[0], sizes[1], shape, (shape,), f"block {sizes[0]} x {sizes[1]}")
        raise self.refuse(f"has weights of strategy {str(strategy)[:40]} with group_size {str(group)[:40]}")

    def decode(self, weight: ForeignWeight) -> Tensor:
        module, settings = weight.name.removesuffix(".weight"), weight.settings
        (rows, columns), grid = weight.shape, settings.grid
        scale = self._scale(f"{module}.weight_scale", settings).reshape(grid.shape)
        zero = self._zero_points(f"{module}.weight_zero_point", settings)
        divisor = None
        if settings.kind == "nvfp4":
            name = f"{module}.weight_global_scale"
            divisor = float(self.stored.numbers(name).reshape(()))
            if divisor <= 0:
                raise self.stored.bad(name, "a positive number", f"it is {divisor}")
        groups = self._group_order(f"{module}.weight_g_idx", columns, grid)
        codes = _reader(settings, self.stored.array(weight.parts[0]), columns)
        result = self.stored.allocate(weight)
        fill_scaled(
            result, codes, scale, zero=zero, rows=np.arange(rows) // grid.height, columns=groups, divisor=divisor
        )
        return result

    def _scale(self, name: str, settings: _Settings) -> Array:
        if settings.kind != "mxfp4":
            return self.stored.numbers(name)
        powers = self.stored.array(name)
        if count := int((powers == E8M0_NAN).sum()):
            raise self.stored.bad(name, f"exponents from 0 to {E8M0_NAN - 1}", f"{count} are {E8M0_NAN}, NaN")
        return powers_of_two(powers)

    def _zero_points(self, name: str, settings: _Settings) -> Array | None:
        """Int32 in the shape of the scales; of packed ones without the offset, as the codes are. None: all are zero."""
        if settings.symmetric:
            if name in self.stored.infos and self.stored.array(name).any():
                raise self.stored.bad(name, "zero throughout, as the scheme is symmetric", "it is not")
            return None
        stored = self.stored.array(name)
        if settings.kind == "packed":
            stored = unpack_words(stored, settings.bits, settings.grid.shape[0]).astype(np.int32)
            stored -= 1 << (settings.bits - 1)
        return stored.astype(np.int32).reshape(settings.grid.shape)

    def _group_order(self, name: str, columns: int, grid: _Grid) -> Array:
        """The group of each input, ``(columns,)``; a g_idx of -1 only stands for groups in order."""
        plain = np.arange(columns) // grid.width
        if name not in self.stored.infos:
            return plain
        self.stored.expect(name, [(columns,)], ["I32", "I64"])
        found = self.stored.array(name)
        if (found == -1).all():
            return plain
        low, high = int(found.min()), int(found.max())
        if low < 0 or high >= grid.shape[1]:
            raise self.stored.bad(name, f"numbers of groups, from 0 to {grid.shape[1] - 1}", f"it has {low} to {high}")
        return found


def _reader(settings: _Settings, stored: Array, columns: int) -> Callable[[int, int], Array]:
    """Rows of codes, as the numbers that scales multiply."""
    if settings.kind == "packed":
        offset = 1 << (settings.bits - 1)
        return lambda begin, end: unpack_words(stored[begin:end].T, settings.bits, columns).T.astype(np.int32) - offset
    if settings.kind == "plain":
        return lambda begin, end: FP8[stored[begin:end]] if stored.dtype == np.uint8 else stored[begin:end]
    return lambda begin, end: FP4[unpack_nibbles(stored[begin:end])]


def _arguments(groups: list[dict[str, Any]], module: str) -> Mapping[str, Any] | None:
    """The weight arguments of the group that ``module`` belongs to: by name, else by pattern, else by class."""
    ways: tuple[Callable[[str], bool], ...] = (
        lambda target: target == module,
        lambda target: target.startswith("re:") and _matches(target[3:], module),
        lambda target: target[:1].isupper(),
    )
    for fits in ways:
        for group in groups:
            if any(map(fits, group["targets"])) and isinstance(group.get("weights"), dict):
                found: Mapping[str, Any] = group["weights"]
                return found
    return None


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error:
        return False
