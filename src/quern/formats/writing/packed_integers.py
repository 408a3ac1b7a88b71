"""What the layouts of GPTQ and AWQ share: linears as integers with zero points and float16 scales, all by one setting.

Such an artifact is what other tools write, so quern opens it as it opens theirs (``quern.checkpoint.foreign``): as the
values that its codes stand for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from quern.architectures.base import Architecture
from quern.checkpoint.jobs.work_folder import WorkFolder
from quern.codecs.base import ScaledParameters
from quern.codecs.packing import bits
from quern.core.errors import UserError
from quern.core.packed import PackedLinear
from quern.core.plan import LinearPlan, Plan
from quern.core.recipe import Recipe
from quern.formats.sharded import ShardedWriter
from quern.formats.writing.refusals import QUERN, cannot_store, misnamed, torn

PER_CHANNEL = -1
"""``group_size`` where an output has one scale."""


class PackedIntegersWriter(ShardedWriter):
    """A subclass names its layout's limits, and stores codes, zero points and scales."""

    allowed_bits: ClassVar[tuple[int, ...]]
    rows_multiple: ClassVar[int]
    """What the outputs of a linear must be a multiple of."""
    columns_multiple: ClassVar[int] = 1
    """What its inputs must be."""

    def __init__(self, recipe: Recipe, plan: Plan, architecture: Architecture) -> None:
        super().__init__(recipe, plan, architecture)
        self._written = plan
        self._saved: dict[str, int] = {}

    @abstractmethod
    def setting(self, params: ScaledParameters) -> str:
        """What config.json says of all linears at once, in words."""

    def check(self) -> None:
        super().check()
        problems: dict[str, list[str]] = {}
        for module, plan in self.plan.quantized().items():
            for problem in self._problems(module, plan):
                problems.setdefault(problem, []).append(module)
        if any(block.sources for block in self.architecture.blocks):
            problems["it stores experts one by one, which transformers' classes of this family do not read"] = []
        plans = [plan for module, plan in self.plan.quantized().items() if module not in self.architecture.outer]
        scaled = [plan.scheme.params for plan in plans if isinstance(plan.scheme.params, ScaledParameters)]
        if len(found := sorted({self.setting(params) for params in scaled})) > 1:
            problems[f"it has one setting for all linears, and these have {len(found)}: {'; '.join(found)}"] = []
        for problem in (*torn(self.architecture, self.plan, lambda plan: plan.quantized), *misnamed(self.architecture)):
            problems[problem] = []
        if problems:
            raise cannot_store(self.recipe.format, self.recipe.name, problems)

    def _problems(self, module: str, plan: LinearPlan) -> Iterator[str]:
        """Everything about ``module`` that the format cannot say."""
        if module in self.architecture.outer:
            yield "runtimes read its embedding and head unquantized; set embedding and head to {codec: none}"
            return
        if plan.rotation is not None:
            yield "it has no rotation of inputs; leave transform hadamard out"
        if plan.activations.mode != "none":
            yield "it has no int8 activations; leave activations out"
        params = plan.scheme.params
        if plan.scheme.codec != "integer" or not isinstance(params, ScaledParameters):
            yield f"it stores integers, not codec {plan.scheme.codec!r}; set codec: integer"
            return
        if params.bits not in self.allowed_bits:
            yield f"it stores {' or '.join(map(str, self.allowed_bits))} bits, not {params.bits}"
        if params.granularity not in ("channel", "group"):
            yield f"it has scales by channel or group, not by {params.granularity}"
        rows, columns = self.architecture.module_shapes()[f"{module}.weight"]
        if params.granularity == "group" and params.group_size is not None and columns % params.group_size:
            yield f"the rows have {columns} inputs, which is not a multiple of the group size {params.group_size}"
        if columns % self.columns_multiple:
            yield f"the rows have {columns} inputs, which is not a multiple of {self.columns_multiple}"
        if rows % self.rows_multiple:
            yield f"it packs outputs by {self.rows_multiple}, and there are {rows}"

    def encode(self, module: str, linear: PackedLinear) -> dict[str, Tensor]:
        assert linear.input_signs is None  # check() refuses rotations
        tensors = {f"{module}.{name}": tensor for name, tensor in self.tensors(module, linear).items()}
        self._saved[module] = linear.weight.stored_bytes - sum(tensor.nbytes for tensor in tensors.values())
        return tensors

    @abstractmethod
    def tensors(self, module: str, linear: PackedLinear) -> dict[str, Tensor]:
        """The stored tensors by the rest of their names behind the module's."""

    def saved_bytes(self, module: str) -> int:
        return self._saved[module]

    def finish(self, work: WorkFolder, config: Mapping[str, Any], plan: Plan) -> None:
        super().finish(work, config, plan)
        self._written = plan

    def kept(self, plan: Plan) -> list[str]:
        """Linears of the blocks that stay as they are."""
        chosen = (name for name in self.architecture.linears if not plan[name].quantized)
        return sorted([*chosen, *self.architecture.never_quantized])

    def common(self, plan: Plan) -> ScaledParameters:
        """The parameters of all linears; the scales' dtype is that of one of them."""
        params = next(iter(plan.quantized().values())).scheme.params
        assert isinstance(params, ScaledParameters)
        return params

    def notes(self) -> list[str]:
        found = []
        dtypes = Counter(
            plan.scheme.params.scale_dtype
            for plan in self._written.quantized().values()
            if isinstance(plan.scheme.params, ScaledParameters)
        )
        for dtype, count in sorted(dtypes.items()):
            if dtype != "float16":
                found.append(
                    f"scales in {dtype} become float16, rounded where that does not hold them ({count} matrices)"
                )
        found.append(
            f"quern runs format {self.recipe.format} as the values that its codes stand for, not packed; format quern is "
            "what it runs packed"
        )
        return found


def half_scales(module: str, scale: Tensor) -> Tensor:
    """Scales ``(rows, groups)`` as float16 ``(groups, rows)``. Raises ``UserError`` for what is beyond float16."""
    half = scale.to(torch.float16)
    if bool(half.isinf().any()):
        raise UserError(
            f"scales of {module} up to {float(scale.float().abs().max()):.3g} are beyond float16, and the format has no "
            f"other. Leave {module} unquantized by an override of codec none, or use {QUERN}"
        )
    return half.T.contiguous()


def packed_codes(params: ScaledParameters, codes: Tensor) -> Tensor:
    """Codes as int32 words along the inputs, as the codec ``integer`` has them but for symmetric ones of 8 bits."""
    if codes.dtype == torch.int8:
        return bits.pack((codes.to(torch.int16) + 128).to(torch.uint8), params.bits)
    return codes


def zero_points(params: ScaledParameters, linear: PackedLinear) -> Tensor:
    """Zero points uint8 ``(groups, rows)``; of a symmetric grid all are its middle."""
    parts, rows = linear.weight.parts, linear.weight.shape[0]
    if params.symmetric:
        return torch.full((parts["scale"].shape[1], rows), 1 << (params.bits - 1), dtype=torch.uint8)
    return bits.unpack(parts["zero_point"].T.contiguous(), params.bits, rows)
