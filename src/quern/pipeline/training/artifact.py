"""The artifact that a training begins with, as a student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quern.architectures.base import Architecture, architecture_of, parameter_reader
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.files import read_json
from quern.codecs.base import CODECS, codec_of
from quern.core.artifact import PROVENANCE, quantization_of
from quern.core.errors import BadFileError, UserError, option
from quern.core.machine.parallel import Workers
from quern.core.plan import Plan
from quern.core.recipe import Recipe, parse_recipe
from quern.core.recipe_parts import ROTATION
from quern.core.scheme import CodecScheme
from quern.formats.base import ArtifactReader, StoredModule, reader_of
from quern.formats.quern import INPUT_SCALE, INPUT_SIGNS
from quern.loading.fitting import model_config, open_model
from quern.pipeline.blockwise.job import plan_of
from quern.quantization.training.distillation import Heads
from quern.quantization.training.inputs import InputRounding
from quern.quantization.training.loop import Kind
from quern.quantization.training.model import Student
from quern.quantization.training.student import StudentBlock, TrainedWeight
from quern.rotation.rotation import rotate


@dataclass(frozen=True)
class Start:
    """An artifact of format quern and what it says of itself."""

    checkpoint: Checkpoint
    architecture: Architecture
    reader: ArtifactReader
    recipe: Recipe
    provenance: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Start:
        """Raises ``UserError`` for what is no artifact that can be trained, ``BadFileError`` for a damaged one."""
        checkpoint = open_model(path)
        architecture = architecture_of(model_config(checkpoint))
        reader = reader_of(quantization_of(checkpoint.config), architecture)
        if reader is None or reader.through_transformers or not (checkpoint.path / PROVENANCE).is_file():
            raise UserError(
                f"{path} is no artifact that training can begin with; it takes artifacts of format quern, as `quern "
                f"quantize` writes them. Name a recipe instead ({option('recipe', '--recipe')}), of any format"
            )
        provenance = read_json(checkpoint.path / PROVENANCE)
        kinds = {"fingerprint": dict, "layers": list, "notes": list}
        if not isinstance(provenance, dict) or not all(isinstance(provenance.get(k), kinds[k]) for k in kinds):
            raise BadFileError(checkpoint.path / PROVENANCE, "is not what quern writes", "Quantize the model again")
        recipe = parse_recipe(reader.quantization.get("recipe"), "of the artifact")
        return cls(checkpoint, architecture, reader, recipe, provenance)

    @cached_property
    def stored(self) -> dict[str, StoredModule]:
        """Every quantized module by full name."""
        return self.reader.plan()

    @cached_property
    def plan(self) -> Plan:
        """What was carried out."""
        plan = plan_of(self.recipe, self.architecture)
        dtypes = {}
        for name, module in self.stored.items():
            carried_out = codec_of(module.scheme).scale_dtype_name
            if carried_out is not None and carried_out != codec_of(plan[name].scheme).scale_dtype_name:
                dtypes[name] = carried_out
        return plan.changed(dtypes)

    def parts(self, module: str) -> tuple[dict[str, Tensor], float | None, Tensor | None]:
        """The codec's parts of a module, the scale of its static activations, the signs of its rotation."""
        parts = self.reader.parts(self.checkpoint, module)
        scale, signs = parts.pop(INPUT_SCALE, None), parts.pop(INPUT_SIGNS, None)
        return parts, None if scale is None else float(scale), signs

    def shape(self, module: str) -> tuple[int, int]:
        """Of the weight of ``module``."""
        rows, columns = self.architecture.module_shapes()[f"{module}.weight"]
        return rows, columns

    def decoded(self, module: str) -> Tensor:
        """The weight of ``module`` as it is stored, float32."""
        if module not in self.stored:
            return self.checkpoint.read(f"{module}.weight").float()
        return codec_of(self.stored[module].scheme).decode(self.shape(module), self.parts(module)[0])

    @property
    def keeps_originals(self) -> bool:
        """Whether the rounded weights were those of the checkpoint, but for a rotation."""
        return all(transform.method == ROTATION for transform in self.recipe.transforms)


def linear_schemes(plan: Plan, architecture: Architecture) -> dict[str, CodecScheme]:
    """Of all quantized linears in blocks, by full name."""
    return {name: plan[name].scheme for name in architecture.linears if plan[name].quantized}


def check_trainable(schemes: Mapping[str, CodecScheme], kind: Kind) -> None:
    """Raise ``UserError`` where nothing, or no code, can be trained."""
    if not schemes:
        raise UserError(
            "the recipe quantizes no linear of a decoder block, so that there is nothing to train. Use another"
        )
    unable = {scheme.codec for scheme in schemes.values() if not codec_of(scheme).trains_codes}
    if kind == "codes" and unable:
        able = ", ".join(name for name in CODECS.names() if CODECS.get(name).trains_codes)
        raise UserError(
            f"codes of codec {', '.join(sorted(unable))} cannot be trained; those of {able} can. Use "
            f"{option('train=scales', '--train scales')}, which leaves codes as they are"
        )


def make_student(
    start: Start, original: Checkpoint, kind: Kind, time: int, dtype: torch.dtype, workers: Workers
) -> Student:
    """The student in the state of the artifact; sequences have ``time`` tokens."""
    architecture = start.architecture
    blocks = [
        StudentBlock(
            architecture, index, _weights(start, original, index, kind, workers), start.checkpoint.read, dtype, time
        )
        for index in range(architecture.layers)
    ]
    norm, head = f"{architecture.final_norm}.weight", f"{architecture.head_owner}.weight"
    heads = Heads(
        architecture.build_norm,
        original.read(norm, finite=True),
        original.read(head, finite=True).to(dtype),
        start.checkpoint.read(norm),
        start.decoded(architecture.head_owner).to(dtype),
    )
    return Student(blocks, heads, _embedding(start, dtype), workers)


def _embedding(start: Start, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    name = start.architecture.embedding
    if name not in start.stored:
        table = start.checkpoint.read(f"{name}.weight").to(dtype)
        return lambda ids: table[ids]
    codec, shape, parts = codec_of(start.stored[name].scheme), start.shape(name), start.parts(name)[0]
    return lambda ids: codec.decode_rows(shape, parts, ids).to(dtype)


def _weights(start: Start, original: Checkpoint, index: int, kind: Kind, workers: Workers) -> dict[str, TrainedWeight]:
    """Of the quantized linears of a block."""
    block = start.architecture.block(index)
    joined = parameter_reader(lambda name: original.read(name, finite=True))

    def one(given: tuple[str, Tensor | None]) -> tuple[str, TrainedWeight]:
        name, weight = given
        stored, shape = start.stored[block.prefix + name], start.shape(block.prefix + name)
        parts, scale, signs = start.parts(block.prefix + name)
        codec = codec_of(stored.scheme)
        if weight is None and kind == "codes":
            weight = codec.decode(shape, parts)
        elif weight is not None and signs is not None:
            weight = rotate(weight, signs)
        rounding = None
        if stored.activations != "none":
            rounding = InputRounding(stored.activations, scale, stored.input_group, signs)
        return name, TrainedWeight(codec.trainable(shape, parts, weight), signs, rounding)

    names = [linear.name for linear in block.linears if block.prefix + linear.name in start.stored]
    wanted = kind == "codes" and start.keeps_originals
    given = [(name, joined(block.sources_of(f"{name}.weight")).float() if wanted else None) for name in names]
    return dict(workers.map(one, given))
