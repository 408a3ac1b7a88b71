"""AWQ checkpoints of the version GEMM, as AutoAWQ and others write them.

For each linear: ``qweight`` int32 ``(in, out / 8)``, ``qzeros`` int32 ``(groups, out / 8)``, ``scales`` ``(groups,
out)``. A word holds eight outputs of 4 bits; field i, from the lowest, is output ``ORDER[i]``. The weight is (code -
zero) * scale.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from quern.checkpoint.foreign._arithmetic import Array, fill_scaled
from quern.checkpoint.foreign.base import (
    FOREIGN,
    SCALES,
    ForeignMethod,
    ForeignWeight,
    group_count,
    in_order,
    named_group,
)

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The outputs of a word in the order of its fields."""
BITS, FIELDS = 4, 8


@FOREIGN.add("awq")
class Awq(ForeignMethod):
    """Integers of 4 bits in groups of inputs, with zero points."""

    tool = "AWQ"

    def weights(self) -> Iterator[ForeignWeight]:
        version = str(self.config.get("version", "gemm"))
        if version.lower() != "gemm":
            raise self.unsupported(f"version {version[:40]!r}", "version 'gemm'")
        bits = "bits" if "bits" in self.config else "w_bit"
        self.integer(bits, (BITS,))
        group = self.integer("group_size" if "group_size" in self.config else "q_group_size", None, 128)
        for module in self.stored.modules("qweight"):
            yield self._weight(module, group)

    def _weight(self, module: str, group: int) -> ForeignWeight:
        codes = f"{module}.qweight"
        info = self.stored.expect(codes, None, ["I32"])
        if len(info.shape) != 2:
            raise self.stored.bad(codes, "a matrix of inputs and eighths of outputs", f"it has {info.shape}")
        columns, words = info.shape
        groups = group_count(columns, group)
        self.stored.expect(f"{module}.scales", [(groups, words * FIELDS)], SCALES)
        self.stored.expect(f"{module}.qzeros", [(groups, words)], ["I32"])
        return ForeignWeight(
            name=f"{module}.weight", shape=(words * FIELDS, columns), bits=BITS, granularity=named_group(group),
            parts=(codes, f"{module}.qzeros", f"{module}.scales"), settings=group,
        )  # fmt: skip

    def decode(self, weight: ForeignWeight) -> Tensor:
        module = weight.name.removesuffix(".weight")
        scale = self.stored.numbers(f"{module}.scales")
        zero = _fields(self.stored.array(f"{module}.qzeros")).astype(np.int32)
        words = self.stored.array(f"{module}.qweight")
        result = self.stored.allocate(weight)
        groups = in_order(weight.shape[1], weight.settings)
        fill_scaled(result.T, lambda begin, end: _fields(words[begin:end]), scale, zero=zero, rows=groups)
        return result


def _fields(words: Array) -> Array:
    """The codes of int32 ``(n, words)`` in the order of the outputs, uint8 ``(n, 8 * words)``."""
    result = np.empty((*words.shape, FIELDS), np.uint8)
    for field, output in enumerate(ORDER):
        result[..., output] = (words >> (BITS * field)) & 15
    return result.reshape(len(words), -1)
