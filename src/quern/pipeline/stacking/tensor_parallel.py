"""Into how many GPUs vLLM can cut the matrices of an artifact.

vLLM cuts query, key, value, gate and up along their rows, output and down along their columns. What it asks of the parts
(github.com/vllm-project/vllm, read in November 2026):

- ``config/model.py``, ``layers/linear.py`` (``divide``): heads and sizes are multiples of the number of GPUs;
  key/value heads that are fewer than GPUs are repeated
- ``kernels/linear/mixed_precision/marlin.py`` (``can_implement``), ``layers/quantization/awq.py``: no group of columns
  lies on two GPUs
- ``layers/quantization/awq.py``: outputs fill the words that they are packed into
- ``layers/quantization/utils/marlin_utils.py`` (``verify_marlin_supports_shape``): Marlin's tiles are 64 outputs and 128
  inputs. Versions whose Marlin fills up tiles with zeros when it loads take others too
- ``_custom_ops.py`` (``cutlass_scaled_mm``): 8 bits of weights and inputs in multiples of 16, else a slower kernel
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from quern.architectures.base import Architecture, LinearSpec
from quern.codecs.base import GROUPED
from quern.core.plan import LinearPlan
from quern.core.text.language import gettext
from quern.loading.padding import PADDED_ROLES

SIZES = (1, 2, 4, 8, 16)
COLUMNS_CUT = ("output", "down")
"""Roles whose columns lie on different GPUs; of all others the rows."""
WORD = 32
"""Bits of the integers that AWQ packs outputs into."""
MARLIN = (64, 128)
"""Outputs and inputs of a tile."""
CUTLASS = (16, 16)


@dataclass(frozen=True)
class ParallelSize:
    """What becomes of a model on so many GPUs."""

    size: int
    problems: tuple[str, ...]
    """Why vLLM refuses it; none if it does not."""
    tiles: tuple[str, ...]
    """Matrices whose parts are no whole tiles of the usual kernel."""
    padding: int | None
    """What would mend both as a recipe's ``padding: {intermediate: ...}``; None if that would not, or nothing is amiss."""


def parallel_sizes(
    plan: Mapping[str, LinearPlan], architecture: Architecture, format: str, sizes: Sequence[int] = SIZES
) -> list[ParallelSize]:
    """What becomes of the linears of ``plan`` on each number of GPUs, in ``format``."""
    return [_parallel_size(plan, architecture, format, size) for size in sizes]


def _parallel_size(plan: Mapping[str, LinearPlan], architecture: Architecture, format: str, size: int) -> ParallelSize:
    problems, tiles, steps = dict.fromkeys(_heads(architecture, size)), dict[str, None](), [size]
    mendable = not problems
    for cut in _cuts(plan, architecture, size):
        own = list(cut.problems(format))
        problems |= dict.fromkeys(own)
        misfits = [] if own else list(cut.misfits())
        tiles |= dict.fromkeys(misfits)
        if cut.linear.role in PADDED_ROLES:
            steps.append(size * cut.step())
        elif own:
            mendable = False
    amiss = problems or any(f"{role}_proj" in tile for tile in tiles for role in PADDED_ROLES)
    return ParallelSize(size, tuple(problems), tuple(tiles), math.lcm(*steps) if amiss and mendable else None)


def _heads(architecture: Architecture, size: int) -> Iterator[str]:
    config = architecture.config
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    if heads % size:
        yield f"{heads} attention heads are no multiple of {size}"
    if shared % size and size % shared:
        yield f"{shared} key/value heads are neither a multiple of {size} nor a divisor"


@dataclass(frozen=True)
class _Cut:
    """A kind of linear, and how it is cut."""

    linear: LinearSpec
    plan: LinearPlan
    size: int
    rows: int
    """Of the matrix in which vLLM holds it, with those that are joined with it, on all GPUs."""

    @property
    def columns_cut(self) -> bool:
        return self.linear.role in COLUMNS_CUT

    @property
    def name(self) -> str:
        return self.linear.name.rpartition(".")[2]

    @property
    def whole(self) -> int:
        """The size that is cut."""
        return self.linear.shape[1] if self.columns_cut else self.linear.shape[0]

    @property
    def group(self) -> int:
        """Columns that share a scale, where several groups do; 1 for all others."""
        params = self.plan.scheme.params
        grouped = getattr(params, "granularity", None) in GROUPED
        group = int(getattr(params, "group_size", None) or 1) if grouped else 1
        return group if group < self.linear.shape[1] else 1

    @property
    def tile(self) -> tuple[int, int]:
        """Outputs and inputs of a tile of the usual kernel."""
        if not self.plan.quantized:
            return 1, 1
        return MARLIN if self.plan.activations.mode == "none" else CUTLASS

    def step(self) -> int:
        """What must divide a part, so that nothing is amiss."""
        return math.lcm(self.group, self.tile[1]) if self.columns_cut else self.tile[0]

    def problems(self, format: str) -> Iterator[str]:
        """Why vLLM refuses it."""
        what = "inputs" if self.columns_cut else "outputs"
        if self.whole % self.size:
            yield f"{self.name} has {self.whole} {what}, no multiple of {self.size}"
            return
        part = self.whole // self.size
        if self.columns_cut and part % self.group:
            groups = f"{part / self.group:g} groups of {self.group}"
            yield f"{self.name} has {self.whole} inputs, of which a GPU gets {part} = {groups}"
        pack = WORD // int(getattr(self.plan.scheme.params, "bits", WORD)) if self.plan.quantized else 1
        if format == "awq" and not self.columns_cut and part % pack:
            yield f"{self.name} has {self.whole} outputs, of which a GPU gets {part}, and AWQ packs {pack} into a word"

    def misfits(self) -> Iterator[str]:
        """Where parts are no whole tiles."""
        rows, columns = self.rows, self.linear.shape[1]
        rows, columns = (rows, columns // self.size) if self.columns_cut else (rows // self.size, columns)
        outputs, inputs = self.tile
        if rows % outputs:
            yield f"{self.name} has {rows} outputs on a GPU, and tiles have {outputs}"
        if columns % inputs:
            yield f"{self.name} has {columns} inputs on a GPU, and tiles have {inputs}"


def _cuts(plan: Mapping[str, LinearPlan], architecture: Architecture, size: int) -> Iterator[_Cut]:
    """Of all blocks, each kind of linear once."""
    seen = set()
    for block in architecture.blocks:
        for linear in block.linears:
            one = plan[block.prefix + linear.name]
            key = linear.name, linear.shape, one.scheme, one.activations
            if linear.expert in (None, 0) and key not in seen:
                seen.add(key)
                joined = [block.linear(name) for name in linear.fused_with] or [linear]
                yield _Cut(linear, one, size, sum(_rows(each, architecture, size) for each in joined))


def _rows(linear: LinearSpec, architecture: Architecture, size: int) -> int:
    """On all GPUs together: key/value heads that are fewer than these are repeated."""
    heads = getattr(architecture.config, "num_key_value_heads", None)
    repeated = size // heads if linear.role in ("key", "value") and heads and size > heads else 1
    return linear.shape[0] * repeated


def told(found: ParallelSize) -> str:
    """A sentence about a size, without its full stop."""
    if found.problems:
        return gettext("refused: {problem}", problem=refusal(found))
    if not found.tiles:
        return gettext("works")
    return gettext("works, in versions that fill up tiles: {tiles}", tiles=gettext("; ").join(found.tiles)) + _mend(
        found
    )


def refusal(found: ParallelSize) -> str:
    """Why vLLM refuses a size, and what would mend it."""
    return gettext("; ").join(found.problems) + _mend(found)


def _mend(found: ParallelSize) -> str:
    if found.padding is None:
        return ""
    return gettext("; padding: {{intermediate: {size}}} in the recipe mends it", size=found.padding)
