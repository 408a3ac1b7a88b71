"""ONNX: a graph that ONNX Runtime loads, and onnxruntime-genai with it (docs/onnx.md).

``model.onnx`` is the graph, ``model.onnx.data`` holds its tensors. Stages are kept beside each other until all are done;
then the graph is made and the tensors are written one behind the other, a stage in memory at a time. Quern writes such
artifacts and does not open them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

import quern
from quern.architectures.base import Architecture
from quern.architectures.gated_decoder import GatedDecoder
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.ends import ending_tokens, generation_defaults
from quern.checkpoint.files import atomic_output, write_bytes, write_json
from quern.checkpoint.folder import CONFIG
from quern.checkpoint.jobs.work_folder import WorkFolder
from quern.codecs.base import codec_of
from quern.core.engine import switch_length
from quern.core.errors import UserError
from quern.core.packed import PackedLinear
from quern.core.plan import Plan
from quern.core.recipe import Recipe
from quern.core.results import Target
from quern.formats.base import FORMATS, ArtifactReader, ArtifactWriter, Format, StoredModule, StoredWeight
from quern.formats.onnx_files import genai, products
from quern.formats.onnx_files.decoder import Decoder
from quern.formats.onnx_files.graph import TYPES, Graph

METHOD = "onnx"
FILE, DATA = "model.onnx", "model.onnx.data"
ACCURACY_LEVEL = "accuracy-level"
"""The option that says what ``MatMulNBits`` makes of its inputs."""
LEVELS = {"1": "float32", "4": "int8"}
RECIPE = "quern.recipe"
_ACTIVATION = "silu"


class OnnxWriter(ArtifactWriter):
    """Stages as safetensors files of what the operators take; then graph and tensors."""

    def __init__(self, recipe: Recipe, plan: Plan, architecture: Architecture) -> None:
        super().__init__(recipe, plan, architecture)
        self._level = max(LEVELS)
        self._saved: dict[str, int] = {}

    def check(self) -> None:
        super().check()
        problems: dict[str, list[str]] = {problem: [] for problem in _model_problems(self.architecture)}
        shapes = self.architecture.module_shapes()
        for module, plan in self.plan.quantized().items():
            rows, columns = shapes[f"{module}.weight"]
            for problem in products.problems(plan, (rows, columns), module == self.architecture.embedding):
                problems.setdefault(problem, []).append(module)
        if problems:
            lines = (
                f"  {problem}{f' ({modules[0]}' if modules else ''}{f' and {len(modules) - 1} more' if modules[1:] else ''}"
                f"{')' if modules else ''}"
                for problem, modules in problems.items()
            )
            raise UserError(
                f"format onnx cannot store recipe {self.recipe.name!r}:\n"
                + "\n".join(lines)
                + "\nChange the recipe, or use format quern"
            )

    def prepare(self, checkpoint: Checkpoint, options: Mapping[str, str]) -> None:
        if unknown := sorted(set(options) - {ACCURACY_LEVEL}):
            raise UserError(f"format onnx has no option {unknown[0]!r}; it has: {ACCURACY_LEVEL}")
        self._level = options.get(ACCURACY_LEVEL, self._level)
        if self._level not in LEVELS:
            known = ", ".join(f"{level} ({inputs} inputs)" for level, inputs in LEVELS.items())
            raise UserError(f"format option {ACCURACY_LEVEL} is {self._level!r}; known: {known}")

    def begin(self, work: WorkFolder, stage: int) -> None:
        self._work, self._stage, self._tensors = work, stage, dict[str, Tensor]()

    def put(self, module: str, linear: PackedLinear) -> None:
        tensors = products.held(module, linear)
        self._saved[module] = linear.weight.stored_bytes - sum(tensor.nbytes for tensor in tensors.values())
        self._tensors |= tensors

    def saved_bytes(self, module: str) -> int:
        return self._saved[module]

    def put_plain(self, name: str, tensor: Tensor) -> None:
        plain = tensor if tensor.dim() > 1 and tensor.dtype in TYPES else tensor.float()
        self._tensors[name] = plain.cpu().contiguous()

    def end(self) -> list[Path]:
        tensors, self._tensors = self._tensors, {}
        return [self._work.write_tensors(_stage_name(self._stage), tensors)]

    def finish(self, work: WorkFolder, config: Mapping[str, Any], plan: Plan) -> None:
        assert isinstance(self.architecture, GatedDecoder)  # check() refuses others
        stages = [_stage_name(stage) for stage in range(self.architecture.layers + 2)]
        needed = sum(work.path(f"{stage}.safetensors").stat().st_size for stage in stages)
        with atomic_output(work.path("artifact", DATA), needed) as file:
            graph = Graph(file, DATA)
            decoder = Decoder(graph, self.architecture, plan, int(self._level))
            decoder.begin(work.read_tensors(stages[0]))
            for index in range(self.architecture.layers):
                decoder.block(index, work.read_tensors(stages[index + 1]))
            decoder.end(work.read_tensors(stages[-1]))
        said = {RECIPE: json.dumps(self.recipe.to_json(), sort_keys=True)}
        write_bytes(work.path("artifact", FILE), graph.model("quern", quern.__version__, said))
        write_json(work.path("artifact", CONFIG), dict(config))

    def accompany(self, work: WorkFolder, provenance: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        assert isinstance(self.architecture, GatedDecoder)
        ends, defaults = ending_tokens(checkpoint), generation_defaults(checkpoint)
        said = genai.genai_config(self.architecture, FILE, ends, defaults)
        write_json(work.path("artifact", genai.FILE), said)
        super().accompany(work, provenance, checkpoint)

    def notes(self) -> list[str]:
        found = []
        wider: dict[tuple[int, int], int] = {}
        shapes = self.architecture.module_shapes()
        for module, plan in self.plan.quantized().items():
            rows, columns = shapes[f"{module}.weight"]
            form = codec_of(plan.scheme).nbits((rows, columns))
            assert not isinstance(form, str)
            bits = int(codec_of(plan.scheme).describe().bits), 8 if plan.activations.mode != "none" else form.bits
            if bits[0] != bits[1]:
                wider[bits] = wider.get(bits, 0) + 1
        for (stored, taken), count in sorted(wider.items()):
            found.append(
                f"codes of {stored} bits take {taken} in ONNX Runtime's operators, with the same values ({count} matrices)"
            )
        if self._level == max(LEVELS) and any(p.activations.mode == "none" for p in self.plan.quantized().values()):
            found.append(
                "onnxruntime rounds the inputs of packed weights to int8, by blocks (accuracy level 4); "
                f"--format-option {ACCURACY_LEVEL}=1 keeps them in float32"
            )
        return found


class OnnxReader(ArtifactReader):
    """There is nothing for it to read: config.json of such a folder is that of the model."""

    def __init__(self, quantization: Mapping[str, Any], architecture: Architecture) -> None:
        raise UserError(
            "config.json names quant_method 'onnx', which quern does not open; run model.onnx with onnxruntime"
        )

    def plan(self) -> dict[str, StoredModule]:
        raise NotImplementedError

    def problems(self, checkpoint: Checkpoint) -> list[str]:
        raise NotImplementedError

    def describe(self, checkpoint: Checkpoint) -> Iterator[tuple[str, StoredWeight]]:
        raise NotImplementedError


@FORMATS.add("onnx")
class Onnx(Format):
    """ONNX Runtime's. Tried with onnxruntime 1.31 and onnxruntime-genai 0.18 on a CPU."""

    method = METHOD
    opened = False
    runtimes: ClassVar[tuple[Target, ...]] = ("onnxruntime",)
    activations_dtype = "float32"
    joins_stages = True
    writer = OnnxWriter
    reader = OnnxReader

    @classmethod
    def tensor_bytes(cls, path: Path) -> int:
        return (path / DATA).stat().st_size


def _model_problems(architecture: Architecture) -> Iterator[str]:
    """Clauses about the model itself that the graph does not say."""
    if not isinstance(architecture, GatedDecoder) or any(
        block.sources or block.experts_per_token for block in architecture.blocks
    ):
        yield f"its graphs are those of dense decoders of Llama's layout, and {architecture.model_type} has another one"
        return
    config = architecture.config
    if config.hidden_act != _ACTIVATION:
        yield f"its graphs have {_ACTIVATION} between gate and up, and the model has {config.hidden_act}"
    switch = switch_length(config)
    if switch is not None and switch < config.max_position_embeddings:
        yield f"its graphs have one set of rotary frequencies, and this model has another one beyond {switch} tokens"


def _stage_name(stage: int) -> str:
    return f"stages/{stage:05d}"
