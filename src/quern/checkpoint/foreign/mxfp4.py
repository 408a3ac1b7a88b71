"""MXFP4 experts as gpt-oss stores them (OCP Microscaling Formats 1.0).

For each stack of matrices: ``X_blocks`` uint8 ``(experts, out, groups, 16)``, two FP4 (E2M1) codes a byte, the low
one first, and ``X_scales`` uint8 ``(experts, out, groups)``, a power of two (E8M0) for the 32 inputs of a group. The
weight ``X`` ``(experts, in, out)`` is transposed, as transformers' experts have it. Its numbers have two significant
bits, so that bfloat16 holds them exactly.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from quern.checkpoint.foreign._arithmetic import E8M0_NAN, FP4, powers_of_two, slabs, unpack_nibbles
from quern.checkpoint.foreign.base import FOREIGN, ForeignMethod, ForeignWeight

GROUP = 32
_BLOCKS, _SCALES = "_blocks", "_scales"


@FOREIGN.add("mxfp4")
class Mxfp4(ForeignMethod):
    """FP4 in groups of 32 that share a power of two."""

    tool = "MXFP4"

    def weights(self) -> Iterator[ForeignWeight]:
        for name in sorted(name.removesuffix(_BLOCKS) for name in self.stored.infos if name.endswith(_BLOCKS)):
            blocks, scales = f"{name}{_BLOCKS}", f"{name}{_SCALES}"
            info = self.stored.expect(blocks, None, ["U8"])
            if len(info.shape) != 4 or info.shape[3] != GROUP // 2:
                raise self.stored.bad(blocks, f"(experts, outputs, groups, {GROUP // 2})", f"it has {info.shape}")
            experts, rows, groups, _ = info.shape
            self.stored.expect(scales, [(experts, rows, groups)], ["U8"])
            yield ForeignWeight(
                name=name, shape=(experts, groups * GROUP, rows), bits=4, granularity=f"group {GROUP}",
                parts=(blocks, scales), dtype="BF16",
            )  # fmt: skip

    def decode(self, weight: ForeignWeight) -> Tensor:
        blocks, scales = (self.stored.array(part) for part in weight.parts)
        if count := int((scales == E8M0_NAN).sum()):
            raise self.stored.bad(
                weight.parts[1], f"exponents from 0 to {E8M0_NAN - 1}", f"{count} are {E8M0_NAN}, NaN"
            )
        result = self.stored.allocate(weight)
        halves = result.view(torch.int16).numpy().view(np.uint16)
        for expert in range(weight.shape[0]):
            for begin, end in slabs(weight.shape[2], weight.shape[1]):
                with np.errstate(over="ignore"):  # to infinity, which whoever uses the weights checks for
                    values = FP4[unpack_nibbles(blocks[expert, begin:end])]
                    values = values * powers_of_two(scales[expert, begin:end])[..., None]
                # The upper half of a float32 is a bfloat16; the lower one is zero here.
                halves[expert, :, begin:end] = (values.reshape(end - begin, -1).view(np.uint32) >> np.uint32(16)).T
        return result
