"""bitsandbytes checkpoints: NF4 and FP4 (``load_in_4bit``), and LLM.int8() (``load_in_8bit``).

**4 bits.** ``weight`` holds two codes a byte, the high one first, along the flattened weight; ``weight.absmax`` a
scale for each block of it; ``weight.quant_map`` float32 ``(16)`` the values of the codes;
``weight.quant_state.bitsandbytes__nf4`` (or ``fp4``) the bytes of a JSON object with ``shape``, ``blocksize`` and
``quant_type``. With double quantization ``absmax`` is uint8, and a scale is ``nested_quant_map[absmax] *
nested_absmax[block of scales] + nested_offset``, in float32 as bitsandbytes computes it.

**8 bits.** ``weight`` int8 ``(out, in)``, ``SCB`` float32 ``(out)``; the weight is code * SCB / 127.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quern.checkpoint.files import parse_json_object
from quern.checkpoint.foreign._arithmetic import Array, fill_scaled, slabs, unpack_nibbles
from quern.checkpoint.foreign.base import FOREIGN, ForeignMethod, ForeignWeight, group_count

TYPES = ("fp4", "nf4")
_STATE = "quant_state.bitsandbytes__"
_LARGEST_STATE = 4096
"""Bytes of a state; real ones have some 200."""
_STORAGE = ("U8", "BF16", "F16", "F32")
"""What the bytes of codes may be declared as."""
_INT8_MOST = 127
_ROW_FORMAT = 0


@dataclass(frozen=True)
class _State:
    """What the JSON object of a weight says."""

    block: int
    nested_block: int | None
    offset: float


@FOREIGN.add("bitsandbytes")
class Bitsandbytes(ForeignMethod):
    """Tables of 16 values with scales for blocks, and int8 with scales for rows."""

    tool = "bitsandbytes"

    def weights(self) -> Iterator[ForeignWeight]:
        four, eight = self._loads("load_in_4bit"), self._loads("load_in_8bit")
        if four == eight:
            raise self.refuse("must say either load_in_4bit or load_in_8bit")
        if eight:
            yield from (self._int8(module) for module in self.stored.modules("SCB"))
            return
        said = self.config.get("bnb_4bit_quant_type", TYPES[0])
        if said not in TYPES:
            raise self.refuse(f"has bnb_4bit_quant_type {repr(said)[:40]}; {self.tool} knows {' and '.join(TYPES)}")
        for kind in TYPES:
            for name in self.stored.modules(f"{_STATE}{kind}"):
                state = f"{name}.{_STATE}{kind}"
                if kind != said:
                    raise self.stored.bad(state, f"of the type {said} that config.json names", f"it is of {kind}")
                yield self._four_bits(name, state, kind)

    def _loads(self, key: str) -> bool:
        return self.flag(key, bool(self.config.get(f"_{key}", False)))

    def _int8(self, module: str) -> ForeignWeight:
        name, scale, form = f"{module}.weight", f"{module}.SCB", f"{module}.weight_format"
        info = self.stored.expect(name, None, ["I8"])
        if len(info.shape) != 2:
            raise self.stored.bad(name, "a matrix", f"it has {info.shape}")
        self.stored.expect(scale, [(info.shape[0],)], ["F32", "F16", "BF16"])
        if form in self.stored.infos:
            self.stored.expect(form, [(), (1,)], ["U8"])
        parts = self.stored.present(name, scale, form)
        return ForeignWeight(name=name, shape=info.shape, bits=8, granularity="channel", parts=parts)

    def _four_bits(self, name: str, state: str, kind: str) -> ForeignWeight:
        said = self._read_state(state, kind)
        shape, settings = _shape(said), _settings(said)
        if shape is None or settings is None:
            raise self.stored.bad(state, "an object with shape, blocksize and quant_type", f"it says {str(said)[:200]}")
        count = prod(shape)
        info = self.stored.expect(name, None, _STORAGE)
        if info.stored_bytes != (count + 1) // 2:
            raise self.stored.bad(
                name, f"{(count + 1) // 2} bytes, for a weight {shape}", f"it has {info.stored_bytes}"
            )
        blocks, nested = group_count(count, settings.block), settings.nested_block
        self.stored.expect(f"{name}.absmax", [(blocks,)], ["F32"] if nested is None else ["U8"])
        self.stored.expect(f"{name}.quant_map", [(16,)], ["F32"])
        small = ["absmax", "quant_map"]
        if nested is not None:
            self.stored.expect(f"{name}.nested_absmax", [(group_count(blocks, nested),)], ["F32"])
            self.stored.expect(f"{name}.nested_quant_map", [(256,)], ["F32"])
            small += ["nested_absmax", "nested_quant_map"]
        return ForeignWeight(
            name=name, shape=shape, bits=4, granularity=f"block {settings.block}",
            parts=(name, *(f"{name}.{part}" for part in small), state), settings=settings,
        )  # fmt: skip

    def _read_state(self, state: str, kind: str) -> dict[str, Any]:
        info = self.stored.expect(state, None, ["U8"])
        if info.stored_bytes > _LARGEST_STATE:
            raise self.stored.bad(state, f"at most {_LARGEST_STATE} bytes of JSON", f"it has {info.stored_bytes}")
        raw = bytes(self.stored.read(state).reshape(-1).tolist())
        said = parse_json_object(self.stored.source.place(state), raw, f"tensor {state!r}")
        if said.get("quant_type") != kind:
            raise self.stored.bad(state, f"of quant_type {kind}", f"it says {str(said.get('quant_type'))[:40]}")
        return said

    def decode(self, weight: ForeignWeight) -> Tensor:
        return self._decode_int8(weight) if weight.bits == 8 else self._decode_four_bits(weight)

    def _decode_int8(self, weight: ForeignWeight) -> Tensor:
        form = f"{weight.name}_format"
        if form in weight.parts and int(self.stored.read(form)) != _ROW_FORMAT:
            raise self.stored.bad(form, f"{_ROW_FORMAT}, rows as they are", f"it is {int(self.stored.read(form))}")
        scale = self.stored.numbers(weight.parts[1])[:, None].astype(np.float64)
        codes = self.stored.array(weight.name)
        result = self.stored.allocate(weight)
        values = result.numpy()
        for begin, end in slabs(weight.shape[0], weight.shape[1]):  # in float64, so that what is stored is rounded once
            values[begin:end] = codes[begin:end] * scale[begin:end] / _INT8_MOST
        return result

    def _decode_four_bits(self, weight: ForeignWeight) -> Tensor:
        name, block = weight.name, weight.settings.block
        scale, table = self._block_scales(name, weight.settings), self.stored.numbers(f"{name}.quant_map")
        packed = self.stored.read(name).reshape(-1).view(torch.uint8).numpy()
        result = self.stored.allocate(weight)
        flat = result.view(-1)
        whole = flat.numel() // block * block
        if whole:
            step = block // 2  # bytes of a block

            def codes(begin: int, end: int) -> Array:
                return table[unpack_nibbles(packed[begin * step : end * step], high_first=True)].reshape(-1, block)

            fill_scaled(flat[:whole].view(-1, block), codes, scale[: whole // block, None])
        if whole < flat.numel():
            rest = unpack_nibbles(packed[whole // 2 :], high_first=True)[: flat.numel() - whole]
            flat[whole:] = torch.from_numpy(table[rest] * scale[-1])
        return result

    def _block_scales(self, name: str, state: _State) -> Array:
        """Float32 ``(blocks)``."""
        if state.nested_block is None:
            return self.stored.numbers(f"{name}.absmax")
        codes = self.stored.array(f"{name}.absmax")
        table = self.stored.numbers(f"{name}.nested_quant_map")
        outer = self.stored.numbers(f"{name}.nested_absmax")[np.arange(codes.size) // state.nested_block]
        with np.errstate(over="ignore"):
            scales: Array = table[codes] * outer + np.float32(state.offset)
        return scales


def _shape(said: dict[str, Any]) -> tuple[int, int] | None:
    shape = said.get("shape")
    if isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and 0 < size < 2**31 for size in shape):
        return shape[0], shape[1]
    return None


def _settings(said: dict[str, Any]) -> _State | None:
    """Blocks are powers of two, so that none begins inside of a byte."""
    block, nested, offset = said.get("blocksize"), said.get("nested_blocksize"), said.get("nested_offset", 0.0)
    sizes = [block, *([] if nested is None else [nested])]
    if not all(type(size) is int and size in _POWERS for size in sizes):
        return None
    if type(offset) not in (int, float) or not math.isfinite(offset):
        return None
    return _State(int(block), nested, float(offset))  # type: ignore[arg-type]


_POWERS = frozenset(2**power for power in range(1, 17))
