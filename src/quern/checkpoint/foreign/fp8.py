"""FP8 checkpoints as DeepSeek and Qwen publish them, and those with one scale for a tensor or a channel.

For each linear: ``weight`` float8 (E4M3) ``(out, in)``, and ``weight_scale_inv`` (which is no inverse: the weight is
code * scale) or ``weight_scale``. With ``weight_block_size: [b, c]`` a scale covers a block, ``(ceil(out / b),
ceil(in / c))``; without, all or one row.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from quern.checkpoint.foreign._arithmetic import FP8, fill_scaled
from quern.checkpoint.foreign.base import FOREIGN, SCALES, ForeignMethod, ForeignWeight

_SCALE_NAMES = ("weight_scale_inv", "weight_scale")
_INPUTS = ("input_scale", "activation_scale")
_CODES = "F8_E4M3"


@FOREIGN.add("fp8")
class Fp8(ForeignMethod):
    """Floats of 8 bits (E4M3) with scales for blocks, channels or tensors."""

    tool = "FP8"

    def weights(self) -> Iterator[ForeignWeight]:
        block = self._block()
        ended = {f"{module}.weight" for part in _SCALE_NAMES for module in self.stored.modules(part)}
        for name in sorted(ended | {name for name, info in self.stored.infos.items() if info.dtype == _CODES}):
            yield self._weight(name, block)

    def _block(self) -> tuple[int, int] | None:
        size = self.config.get("weight_block_size")
        if size is None:
            return None
        if isinstance(size, list) and len(size) == 2 and all(type(item) is int and 0 < item < 2**31 for item in size):
            return size[0], size[1]
        raise self.refuse(f"has weight_block_size {str(size)[:40]}, which must be two positive integers")

    def _weight(self, name: str, block: tuple[int, int] | None) -> ForeignWeight:
        module = name.removesuffix(".weight")
        info = self.stored.expect(name, None, [_CODES])
        if len(info.shape) != 2:
            raise self.stored.bad(name, "a matrix", f"it has {info.shape}")
        rows, columns = info.shape
        scale = next(
            iter(self.stored.present(*(f"{module}.{part}" for part in _SCALE_NAMES))), f"{module}.weight_scale_inv"
        )
        if block is not None:
            wanted: list[tuple[int, ...]] = [(-(-rows // block[0]), -(-columns // block[1]))]
            granularity = f"block {block[0]} x {block[1]}"
        else:
            wanted, block = [(), (1,), (1, 1), (rows, 1)], (rows, columns)
            granularity = "tensor"
            if scale in self.stored.infos and self.stored.infos[scale].shape == (rows, 1) != (1, 1):
                granularity, block = "channel", (1, columns)
        self.stored.expect(scale, wanted, SCALES)
        inputs = self.stored.present(*(f"{module}.{part}" for part in _INPUTS))
        return ForeignWeight(
            name=name, shape=info.shape, bits=8, granularity=granularity, parts=(name, scale, *inputs), settings=block
        )

    def decode(self, weight: ForeignWeight) -> Tensor:
        (rows, columns), (height, width) = weight.shape, weight.settings
        scale = self.stored.numbers(weight.parts[1]).reshape(-(-rows // height), -(-columns // width))
        codes = self.stored.array(weight.name)
        result = self.stored.allocate(weight)
        fill_scaled(
            result,
            lambda begin, end: FP8[codes[begin:end]],
            scale,
            rows=np.arange(rows) // height,
            columns=np.arange(columns) // width,
        )
        return result

    def notes(self) -> list[str]:
        return ["FP8 runtimes round the inputs of linears too; the decoded weights are used with inputs as they are"]
