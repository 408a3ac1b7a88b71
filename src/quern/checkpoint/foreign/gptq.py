"""GPTQ checkpoints, as AutoGPTQ, GPTQModel and others write them.

For each linear of ``in`` inputs and ``out`` outputs: ``qweight`` int32 ``(in * bits / 32, out)``, codes along the
inputs, lowest bits first and, at 3 bits, across words; ``qzeros`` int32 ``(groups, out * bits / 32)``, packed alike
along the outputs; ``scales`` ``(groups, out)``; ``g_idx`` int32 ``(in)``, the group of each input. The weight is
(code - zero) * scale.

``checkpoint_format: gptq`` stores each zero point less one, ``gptq_v2`` as it is. A zero point of zero does not fit the
former. GPTQModel, which names itself in ``meta``, subtracts one from all fields of a word at once, and zero borrows from
its neighbour: adding whole words brings all of them back (2, 4 and 8 bits). Of other writers a field of ones is refused,
because readers disagree on what it means: the zero point 2 ** bits, zero, or a carry.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from quern.checkpoint.foreign._arithmetic import Array, fill_scaled, unpack_words, words_for
from quern.checkpoint.foreign.base import (
    FOREIGN,
    SCALES,
    ForeignMethod,
    ForeignWeight,
    group_count,
    in_order,
    named_group,
)

BITS = (2, 3, 4, 8)
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_MULTIPLE = 32
"""Inputs that whole words hold at each of the widths."""
_ONES = {bits: sum(1 << first for first in range(0, 32, bits)) for bits in (2, 4, 8)}
"""A word with 1 in each of its fields."""
_SINCE = (0, 9)
"""The version of GPTQModel from which on it subtracts whole words."""


@dataclass(frozen=True)
class _Settings:
    bits: int
    group_size: int
    groups: int
    desc_act: bool


@FOREIGN.add("gptq")
class Gptq(ForeignMethod):
    """Integers of 2, 3, 4 or 8 bits in groups of inputs."""

    tool = "GPTQ"

    def weights(self) -> Iterator[ForeignWeight]:
        if _differs_by_module(self.config.get("dynamic")):
            raise self.unsupported("the setting 'dynamic' (other bits for some linears)", "one setting for all linears")
        self._offset()
        for module in self.stored.modules("qweight"):
            yield self._weight(module)

    def _offset(self) -> int:
        """What is added to stored zero points."""
        form, dtype = self.config.get("checkpoint_format", "gptq"), self.config.get("pack_dtype", "int32")
        if form not in ("gptq", "gptq_v2") or dtype != "int32":
            what = f"the packing {str(form)[:40]!r} in {str(dtype)[:40]}"
            raise self.unsupported(what, "checkpoint_format gptq or gptq_v2, in int32,")
        return 1 if form == "gptq" else 0

    def _weight(self, module: str) -> ForeignWeight:
        bits, group = self.integer("bits", BITS), self.integer("group_size", None, -1)
        codes = f"{module}.qweight"
        info = self.stored.expect(codes, None, ["I32"])
        if len(info.shape) != 2 or info.shape[0] % bits or info.shape[1] * bits % 32:
            raise self.stored.bad(
                codes,
                f"a matrix that packs inputs and outputs in multiples of 32 to {bits} bits",
                f"it has {info.shape}",
            )
        columns, rows = info.shape[0] * 32 // bits, info.shape[1]
        groups = group_count(columns, group)
        self.stored.expect(f"{module}.scales", [(groups, rows)], SCALES)
        self.stored.expect(f"{module}.qzeros", [(groups, words_for(rows, bits))], ["I32"])
        order = f"{module}.g_idx"
        desc_act = self.flag("desc_act", False)
        if desc_act or order in self.stored.infos:
            self.stored.expect(order, [(columns,)], ["I32", "I64"])
        return ForeignWeight(
            name=f"{module}.weight", shape=(rows, columns), bits=bits, granularity=named_group(group),
            parts=self.stored.present(*(f"{module}.{part}" for part in _PARTS)),
            settings=_Settings(bits, group, groups, desc_act),
        )  # fmt: skip

    def decode(self, weight: ForeignWeight) -> Tensor:
        module, settings = weight.name.removesuffix(".weight"), weight.settings
        bits = settings.bits
        scale = self.stored.numbers(f"{module}.scales")
        zero = self._zero_points(f"{module}.qzeros", bits, weight.shape[0])
        groups = self._groups(f"{module}.g_idx", weight.shape[1], settings)
        words = self.stored.array(f"{module}.qweight")
        result = self.stored.allocate(weight)

        def codes(begin: int, end: int) -> Array:
            return unpack_words(words[begin * bits // 32 : end * bits // 32], bits, end - begin)

        fill_scaled(result.T, codes, scale, zero=zero, rows=groups, multiple=_MULTIPLE)
        return result

    def _zero_points(self, name: str, bits: int, rows: int) -> Array:
        """Int32 ``(groups, rows)``."""
        words, offset, most = self.stored.array(name), self._offset(), (1 << bits) - 1
        if offset and 32 % bits == 0 and _by_gptqmodel(self.config):
            words, offset = (words.view(np.uint32) + np.uint32(_ONES[bits])).view(np.int32), 0
        stored = unpack_words(words.T, bits, rows).T.astype(np.int32)
        if int(stored.max()) + offset > most:
            count = int((stored + offset > most).sum())
            raise self.stored.bad(
                name,
                f"zero points less one, from 0 to {most - 1}",
                f"{count} are {most}, which stands for none of {bits} bits",
            )
        return stored + offset

    def _groups(self, name: str, columns: int, settings: _Settings) -> Array:
        """The group of each input, ``(columns,)``."""
        plain = in_order(columns, settings.group_size)
        if name not in self.stored.infos:
            return plain
        found = self.stored.array(name)
        low, high = int(found.min()), int(found.max())
        if low < 0 or high >= settings.groups:
            raise self.stored.bad(
                name, f"numbers of groups, from 0 to {settings.groups - 1}", f"it has {low} to {high}"
            )
        if not settings.desc_act and not np.array_equal(found, plain):
            raise self.stored.bad(
                name,
                "groups in the order of the inputs, as desc_act is false",
                "they are in another, which some readers ignore",
            )
        return found


def _differs_by_module(dynamic: Any) -> bool:
    """Whether rules for some linears say more than that they are left out, which is seen from what is stored."""
    rules = dynamic.items() if isinstance(dynamic, dict) else [] if dynamic is None else [("", dynamic)]
    return any(settings and not str(pattern).startswith("-:") for pattern, settings in rules)


def _by_gptqmodel(config: Mapping[str, Any]) -> bool:
    """Whether ``meta`` says that GPTQModel wrote the zero points."""
    meta = config.get("meta")
    said = meta.get("quantizer") if isinstance(meta, dict) else None
    writers = said if isinstance(said, list) else [said]
    found = [re.match(r"gptqmodel:(\d{1,4})\.(\d{1,4})", str(writer).lower()) for writer in writers]
    return any(match is not None and (int(match[1]), int(match[2])) >= _SINCE for match in found)
