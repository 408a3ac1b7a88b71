"""What an artifact of a plan will take on the disk, counted before anything is quantized.

Tensor data are counted exactly, from what the format stores of each matrix. Of the other files those bytes are counted that
will be written; where they hold numbers that only quantizing finds (the errors of linears in the provenance), the longest
text of such a number is taken, so that the sum is never less than the artifact and above it by a few bytes a linear and
about 100 for each input that linears share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.safetensors_file import DTYPES
from quern.codecs.base import codec_of
from quern.core.artifact import InputSummary
from quern.core.errors import UserError
from quern.core.packed import PackedLinear, QuantizedWeight
from quern.core.plan import LinearPlan, Plan
from quern.core.recipe import Recipe
from quern.core.results import TunedBlock
from quern.formats.base import FORMATS, SizedWriter
from quern.loading.padding import padding_record
from quern.pipeline.blockwise.job import plan_of, stand_in_note
from quern.pipeline.request import checked_writer
from quern.quantization.calibration.sketch import RUNS

LONGEST_ERROR = 1.2345678901234567e-05
"""A number whose text is as long as any between 0 and 1."""
LONGEST_SUMMARY = 1.2346e-05
"""The same of those of ``InputSummary``, which have five digits."""
CACHE_BYTES = 2
"""Of a number in the key/value cache: float16, which the engine uses unless it is told otherwise."""

Meta = dict[str, Tensor]
"""Tensors without memory, by name."""


@dataclass(frozen=True)
class ArtifactBytes:
    """Bytes of one artifact."""

    data: int
    """Of all tensors."""
    files: int
    """Of all files."""


class Sizes:
    """Of the artifacts that recipes make of one model. ``fingerprint`` is that of the job, whatever its recipe."""

    error: ClassVar[float] = LONGEST_ERROR
    summary: ClassVar[float] = LONGEST_SUMMARY
    """In place of numbers that only quantizing finds."""

    def __init__(
        self, checkpoint: Checkpoint, architecture: Any, writer: object, fingerprint: Mapping[str, Any]
    ) -> None:
        if not isinstance(writer, SizedWriter):
            known = ", ".join(name for name in FORMATS if issubclass(FORMATS.get(name).writer, SizedWriter))
            raise UserError(
                "an allocation needs a format whose size is known beforehand, which this one's is not. Plan for one of "
                f"{known}, and export what comes of it"
            )
        self._checkpoint, self._architecture, self._fingerprint = checkpoint, architecture, fingerprint
        self._writer = writer
        self._shapes = architecture.module_shapes()
        self._known: dict[tuple[object, ...], Meta] = {}
        self._saved: dict[tuple[object, ...], int] = {}
        self._companions = writer.companion_bytes(checkpoint)

    def shape(self, module: str) -> tuple[int, int]:
        """(rows, columns) of a matrix."""
        rows, columns = self._shapes[f"{module}.weight"]
        return rows, columns

    def of_matrix(self, module: str, plan: LinearPlan) -> int:
        """Bytes of tensor data that are stored for ``module``."""
        return sum(tensor.nbytes for tensor in self._stored(module, plan).values())

    def of_cache(self, context: int) -> int:
        """Bytes of a key/value cache of ``context`` tokens."""
        config = self._architecture.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * self._architecture.layers * heads * width * CACHE_BYTES * context)

    def of_artifact(self, recipe: Recipe) -> ArtifactBytes:
        """Of the whole artifact that ``recipe`` makes; raises ``UserError`` where its format cannot store that."""
        plan = plan_of(recipe, self._architecture)
        writer = checked_writer(recipe, plan, self._architecture)
        assert isinstance(writer, SizedWriter)
        writer.prepare_like(self._writer)
        stages = list(self._stages(plan))
        provenance = {
            "fingerprint": {**self._fingerprint, "recipe": recipe.to_json()},
            "layers": [self._layer(name, one) for name, one in plan.quantized().items()],
            "notes": [*self._checkpoint.lasting_notes, *stand_in_note(recipe, plan, self._architecture)],
            "files": [],
            **padding_record(self._checkpoint),
            **self._inputs(recipe, plan),
            **self._tuning(recipe, plan),
        }
        files = self._companions + writer.artifact_bytes(stages, self._checkpoint.config, provenance, plan)
        return ArtifactBytes(sum(tensor.nbytes for stage in stages for tensor in stage.values()), files)

    def _inputs(self, recipe: Recipe, plan: Plan) -> dict[str, Any]:
        """What calibration will say of the inputs of linears, with numbers whose texts are the longest."""
        if not recipe.needs_calibration:
            return {}
        number, groups = self.summary, []
        for block in self._architecture.blocks:
            certain = {linear.name for linear in block.linears if linear.expert is None}
            for group in block.groups:
                linears = [block.prefix + name for name in group.linears if name in certain]
                if quantized := [name for name in linears if plan[name].quantized]:
                    groups.append(
                        InputSummary.model_construct(
                            linears=tuple(quantized), reach=number, greatest=number, profile=(number,) * RUNS,
                            spread=(number, number), clip=number, clipped=number,
                        ).model_dump(mode="json")
                    )  # fmt: skip
        tokens = recipe.calibration.tokens
        return {"inputs": {"tokens": tokens, "sequences": tokens, "groups": groups}}

    def _tuning(self, recipe: Recipe, plan: Plan) -> dict[str, Any]:
        """What will be said of tuned blocks, with numbers whose texts are the longest."""
        if recipe.tuning is None:
            return {}
        error, steps = self.error, recipe.tuning.passes * recipe.calibration.tokens
        tuned = [
            TunedBlock(block=block.index, before=error, after=error, steps=steps, best_step=steps)
            for block in self._architecture.blocks
            if any(plan[block.prefix + linear.name].quantized for linear in block.linears)
        ]
        return {"tuning": [one.model_dump(mode="json") for one in tuned]}

    def _layer(self, name: str, plan: LinearPlan) -> dict[str, Any]:
        rows, columns = self.shape(name)
        self._stored(name, plan)
        stored = _nbytes(codec_of(plan.scheme).part_shapes((rows, columns))) - self._saved[self._key(name, plan)]
        bits = 8 * (stored + (0 if plan.rotation is None else -(-columns // 8))) / (rows * columns)
        return {"linear": name, "bits_per_weight": bits, "relative_error": self.error}

    def _stages(self, plan: Plan) -> Iterator[Meta]:
        """The tensors of each shard."""
        architecture = self._architecture
        yield self._module(architecture.embedding, plan)
        for block in architecture.blocks:
            stage: Meta = {}
            linears = {block.prefix + linear.name for linear in block.linears}
            for name in architecture.parameters(block.index):
                module = (block.prefix + name).removesuffix(".weight")
                stored = self._checkpoint.info(block.sources_of(name)[0].tensor).dtype
                if module in linears:
                    stage |= self._module(module, plan)
                else:
                    shape = architecture.parameters(block.index)[name]
                    stage[block.prefix + name] = self._writer.plain(_meta(shape, DTYPES[stored]))
            yield stage
        norm = f"{architecture.final_norm}.weight"
        last = {norm: self._writer.plain(_meta(self._shapes[norm], DTYPES[self._checkpoint.info(norm).dtype]))}
        for module in architecture.outer[1:]:
            last |= self._module(module, plan)
        yield last

    def _module(self, module: str, plan: Plan) -> Meta:
        return {f"{module}.{part}": tensor for part, tensor in self._stored(module, plan[module]).items()}

    def _stored(self, module: str, plan: LinearPlan) -> Meta:
        """The tensors that are stored for a matrix, by the rest of their names behind the module's."""
        key = self._key(module, plan)
        if key not in self._known:
            self._known[key] = self._encoded(self.shape(module), plan) if plan.quantized else {
                "weight": self._writer.plain(_meta(self.shape(module), self._dtype(module)))
            }  # fmt: skip
            self._saved[key] = self._writer.saved_bytes("x") if plan.quantized else 0
        return self._known[key]

    def _key(self, module: str, plan: LinearPlan) -> tuple[object, ...]:
        """What the tensors of a matrix depend on."""
        return self.shape(module), self._dtype(module), plan.scheme, plan.rotation is None, plan.activations.mode

    def _dtype(self, module: str) -> torch.dtype:
        source = self._architecture.sources_of(f"{module}.weight")[0].tensor
        return DTYPES[self._checkpoint.info(source).dtype]

    def _encoded(self, shape: tuple[int, int], plan: LinearPlan) -> Meta:
        parts = {
            name: torch.zeros(size, dtype=dtype)
            for name, (size, dtype) in codec_of(plan.scheme).part_shapes(shape).items()
        }
        signs = None if plan.rotation is None else torch.zeros(-(-shape[1] // 8), dtype=torch.uint8)
        packed = PackedLinear(
            QuantizedWeight(plan.scheme, shape, parts),
            plan.activations.mode,
            1.0 if plan.activations.mode == "static" else None,
            signs,
        )
        encoded = self._writer.encode("x", packed)
        return {name.removeprefix("x."): _meta(tensor.shape, tensor.dtype) for name, tensor in encoded.items()}


def _meta(shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _nbytes(parts: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    return sum(_meta(shape, dtype).nbytes for shape, dtype in parts.values())
