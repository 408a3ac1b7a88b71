"""GGUF: one file that llama.cpp loads, and whatever is built on it (docs/gguf.md).

Every matrix lies in blocks of a ggml type that its codec names (``Codec.ggml``), norms and biases are float32, and what
stayed as it was keeps its dtype. Stages are kept beside each other until all are done; then the file is written from front
to back. Its metadata also hold what ``quern.json`` says of other artifacts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import quern
from quern.architectures.base import Architecture
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.ends import ending_tokens
from quern.checkpoint.gguf.header import read_gguf_header
from quern.checkpoint.gguf.names import ROPE_FREQUENCIES, gguf_name, interleave_rows, reordered_heads
from quern.checkpoint.gguf.split import part_name, read_parts, split_metadata, splits_of
from quern.checkpoint.gguf.writing.container import (
    ALIGNMENT,
    ARCHITECTURE,
    OTHER_HEAD,
    TensorPlan,
    head_bytes,
    in_parts,
    padded,
)
from quern.checkpoint.gguf.writing.metadata import ModelMetadata, model_metadata
from quern.checkpoint.gguf.writing.vocabulary import Vocabulary, vocabulary
from quern.checkpoint.jobs.work_folder import WorkFolder
from quern.checkpoint.safetensors_file import DTYPES, TensorInfo
from quern.codecs.base import codec_of
from quern.codecs.packing.ggml import GgmlForm
from quern.core.errors import BadFileError, UserError
from quern.core.packed import PackedLinear
from quern.core.plan import LinearPlan, Plan
from quern.core.recipe import Recipe
from quern.core.results import Target
from quern.core.text.language import gettext
from quern.core.text.units import parse_size
from quern.formats._gguf_file_type import file_type
from quern.formats._gguf_stacks import as_stored, stored_shape, uneven_stacks
from quern.formats.base import FORMATS, UNNAMED, Format, Obstacle, SizedWriter
from quern.formats.writing.joined import GgufFile, Layout, StageFile, join

METHOD = "gguf"
SUFFIX = ".gguf"
FILE = f"{UNNAMED}{SUFFIX}"
"""Name of the file before it gets the one that was asked for."""
PRE_TOKENIZER = "pre-tokenizer"
"""The option that names the rule by which text is cut."""
PROVENANCE = "quern.provenance"
"""Key of the metadata under which lies, as JSON, what was done."""
RECIPE = "quern.recipe"
SHARD_SIZE = "shard-size"
"""The option that says how large a file may be."""
OPTIONS = (PRE_TOKENIZER, SHARD_SIZE)
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_SHOWN = 6


class GgufWriter(SizedWriter):
    """Stages as safetensors files of ggml's blocks, under llama.cpp's names; then one file, or several of a size."""

    def __init__(self, recipe: Recipe, plan: Plan, architecture: Architecture) -> None:
        super().__init__(recipe, plan, architecture)
        self._said: ModelMetadata | None = None
        self._vocabulary = Vocabulary({})
        self._config: dict[str, Any] = architecture.config.to_dict()
        self._written = plan
        self._saved: dict[str, int] = {}
        self._most: int | None = None

    def check(self) -> None:
        super().check()
        problems: dict[str, list[str]] = {}
        for module, plan in self.plan.quantized().items():
            for problem in self._problems(module, plan):
                problems.setdefault(problem, []).append(module)
        kinds = {name: form.kind for name, form in self._forms() if isinstance(form, GgmlForm)}
        for problem, modules in uneven_stacks(self.architecture, kinds):
            problems.setdefault(problem, []).extend(modules)
        if problems:
            lines = (
                f"  {problem} ({modules[0]}{f' and {len(modules) - 1} more' if modules[1:] else ''})"
                for problem, modules in problems.items()
            )
            raise UserError(
                f"format gguf cannot store recipe {self.recipe.name!r}:\n"
                + "\n".join(lines)
                + "\nChange the recipe, or use format quern"
            )

    def _problems(self, module: str, plan: LinearPlan) -> Iterator[str]:
        if plan.rotation is not None:
            yield "llama.cpp rotates no inputs; leave transform hadamard out"
        form = self._form(module, plan)
        if isinstance(form, str):
            yield form

    def _form(self, module: str, plan: LinearPlan) -> GgmlForm | str:
        return codec_of(plan.scheme).ggml(self._shape(module))

    def _forms(self) -> Iterator[tuple[str, GgmlForm | str]]:
        return ((module, self._form(module, plan)) for module, plan in self.plan.quantized().items())

    def _shape(self, module: str) -> tuple[int, int]:
        rows, columns = self.architecture.module_shapes()[f"{module}.weight"]
        return rows, columns

    def prepare(self, checkpoint: Checkpoint, options: Mapping[str, str]) -> None:
        if unknown := sorted(set(options) - set(OPTIONS)):
            raise UserError(f"format gguf has no option {unknown[0]!r}; it has: {', '.join(OPTIONS)}")
        self._most = parse_size(options[SHARD_SIZE], SHARD_SIZE) if SHARD_SIZE in options else None
        windows = [block.window for block in self.architecture.blocks]
        self._said = model_metadata(self._config, windows, checkpoint.path.stem or checkpoint.path.name)
        ends = ending_tokens(checkpoint)
        self._vocabulary = vocabulary(checkpoint.path, self._config["vocab_size"], ends, options.get(PRE_TOKENIZER))

    def begin(self, work: WorkFolder, stage: int) -> None:
        self._work, self._stage, self._tensors = work, stage, dict[str, Tensor]()

    def put(self, module: str, linear: PackedLinear) -> None:
        assert linear.input_signs is None  # check() refuses rotations
        ((name, blocks),) = self.encode(module, linear).items()
        self._keep(name, blocks)

    def encode(self, module: str, linear: PackedLinear) -> dict[str, Tensor]:
        weight = linear.weight
        blocks = codec_of(weight.scheme).ggml_blocks(weight.shape, weight.parts).data
        self._saved[module] = weight.stored_bytes - blocks.nbytes
        return {f"{module}.weight": blocks}

    def saved_bytes(self, module: str) -> int:
        return self._saved[module]

    def put_plain(self, name: str, tensor: Tensor) -> None:
        self._keep(name, self.plain(tensor).cpu())

    def plain(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.dim() > 1 and tensor.dtype in _DTYPES else tensor.float()

    def _keep(self, name: str, tensor: Tensor) -> None:
        heads = reordered_heads(self._config, name)
        stored = tensor if heads is None else interleave_rows(tensor, heads)
        self._tensors[name] = stored.contiguous()

    def end(self) -> list[Path]:
        tensors, self._tensors = dict(as_stored(self._tensors)), {}
        return [self._work.write_tensors(_stage_name(self._stage), tensors)]

    def finish(self, work: WorkFolder, config: Mapping[str, Any], plan: Plan) -> None:
        self._written = plan  # the file comes last, because it begins with what is said of all

    def joining(self, work: WorkFolder) -> dict[str, Any] | None:
        known = Layout.known(work)
        return None if known is None else known.provenance

    def accompany(self, work: WorkFolder, provenance: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        paths = [work.path(f"{_stage_name(stage)}.safetensors") for stage in range(self.architecture.layers + 2)]
        factors = () if self._said is None or self._said.factors is None else (self._said.factors,)
        stages = [StageFile(path, () if stage else factors) for stage, path in enumerate(paths)]
        layout = Layout.known(work)
        if layout is None:
            layout = self._layout(stages, provenance)
            layout.keep(work)
        join(work, self._files(work.path("artifact", FILE), layout), layout, stages)

    def _layout(self, stages: Sequence[StageFile], provenance: Mapping[str, Any]) -> Layout:
        """What complete stages will be in the file."""
        kinds = self._kinds()
        found = [list(_described(_of_header(stage.described()), kinds)) for stage in stages]
        found[0] = [*self._factors(), *found[0]]
        by_module = {module: kinds[gguf_name(f"{module}.weight")][0] for module in self._written.quantized()}
        matrices = [tensor for stage in found for tensor in stage if len(tensor.shape) > 1]
        return Layout(found, file_type(self.architecture, by_module, matrices), dict(provenance))

    def _files(self, path: Path, layout: Layout) -> list[GgufFile]:
        """The file, or the parts of it, called after it. ``prepare`` comes before."""
        tensors = layout.tensors
        metadata = self._metadata(layout.file_type, self.recipe.to_json(), layout.provenance)
        parts = self._parts(metadata, tensors)
        if len(parts) == 1:
            return [GgufFile(path, metadata, tensors)]
        files = []
        for place, part in enumerate(parts):
            shared = metadata if place == 0 else {ARCHITECTURE: metadata[ARCHITECTURE]}
            said = {**shared, **split_metadata(place, len(parts), len(tensors))}
            files.append(GgufFile(path.with_name(part_name(path.stem, place, len(parts))), said, part))
        return files

    def _metadata(self, number: int, recipe: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
        assert self._said is not None
        return {
            **self._said.values,
            "general.file_type": number,
            "general.quantized_by": f"quern {quern.__version__}",
            **self._vocabulary.values,
            RECIPE: json.dumps(recipe, sort_keys=True),
            PROVENANCE: json.dumps(provenance, sort_keys=True),
        }

    def _factors(self) -> list[TensorPlan]:
        factors = None if self._said is None else self._said.factors
        return [] if factors is None else [TensorPlan(ROPE_FREQUENCIES, tuple(factors.shape), "F32")]

    def _parts(self, metadata: Mapping[str, Any], tensors: list[TensorPlan]) -> list[list[TensorPlan]]:
        """The tensors by file."""
        if self._most is None:
            return [tensors]
        head = head_bytes({**metadata, **split_metadata(0, 1, len(tensors))}, tensors)
        return in_parts(tensors, self._most, head)

    def companion_bytes(self, checkpoint: Checkpoint) -> int:
        shapes = self.architecture.module_shapes()
        names = dict.fromkeys(gguf_name(name) for name in shapes)
        tensors = [*self._factors(), *(TensorPlan(name, (1, 1), "F32") for name in names)]
        return head_bytes(self._metadata(0, {}, {}), tensors) + sum(padded(one.stored_bytes) for one in self._factors())

    def prepare_like(self, other: SizedWriter) -> None:
        assert isinstance(other, GgufWriter)
        self._said, self._vocabulary, self._most = other._said, other._vocabulary, other._most

    def artifact_bytes(
        self,
        stages: Sequence[dict[str, Tensor]],
        config: Mapping[str, Any],
        provenance: Mapping[str, Any],
        plan: Plan,
    ) -> int:
        metadata = self._metadata(0, self.recipe.to_json(), provenance)
        texts = sum(len(metadata[key].encode()) - len(json.dumps({})) for key in (RECIPE, PROVENANCE))
        named = [pair for stage in stages for pair in as_stored(stage)]
        data = sum(padded(tensor.nbytes) for _, tensor in named)
        shapes = ((name, tuple(tensor.shape), tensor.dtype) for name, tensor in named)
        described = _described(shapes, self._kinds())
        parts = self._parts(metadata, [*self._factors(), *described])
        return texts + data + ALIGNMENT + (OTHER_HEAD * len(parts) if len(parts) > 1 else 0)

    def _kinds(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The type and shape of every matrix that is stored in blocks, by llama.cpp's name."""
        found = {}
        for module, plan in self._written.quantized().items():
            form = self._form(module, plan)
            assert isinstance(form, GgmlForm)
            found[gguf_name(f"{module}.weight")] = form.kind, stored_shape(self.architecture, f"{module}.weight")
        return found

    def notes(self) -> list[str]:
        found = [*([] if self._said is None else self._said.notes), *self._vocabulary.notes]
        said: dict[str, int] = {}
        for module, plan in self.plan.quantized().items():
            form = self._form(module, plan)
            for note in () if isinstance(form, str) else form.notes:
                said[note] = said.get(note, 0) + 1
        found += [f"{note}, rounded where that does not hold them ({count} matrices)" for note, count in said.items()]
        if any(plan.activations.mode != "none" for plan in self.plan.quantized().values()):
            found.append(
                "llama.cpp quantizes activations in its own way; what the recipe says of them is not in the file"
            )
        return found


def _described(
    tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]], kinds: Mapping[str, tuple[str, tuple[int, ...]]]
) -> Iterator[TensorPlan]:
    """Of stored tensors, by llama.cpp's name with shape and dtype, what the file says of them; ``kinds``: of blocks."""
    for name, shape, dtype in tensors:
        plain = _DTYPES.get(dtype)
        yield TensorPlan(name, shape, plain) if plain else TensorPlan(name, *kinds[name][::-1])


def _of_header(header: Mapping[str, TensorInfo]) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    return ((name, info.shape, DTYPES[info.dtype]) for name, info in header.items())


def _stage_name(stage: int) -> str:
    return f"stages/{stage:05d}"


@FORMATS.add("gguf")
class Gguf(Format):
    """llama.cpp's. Quern opens it as what its blocks decode to."""

    method = METHOD
    suffix = SUFFIX
    opened_as_values = True
    runtimes: ClassVar[tuple[Target, ...]] = ("llama.cpp", "quern")
    activations_dtype = "float32"
    joins_stages = moves_stages = True
    writer = GgufWriter

    @classmethod
    def provenance(cls, path: Path) -> dict[str, Any] | None:
        try:
            said = read_gguf_header(path).metadata.get(PROVENANCE)
            found = json.loads(said) if isinstance(said, str) else None
        except (BadFileError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    @classmethod
    def files(cls, path: Path) -> list[Path]:
        """The file itself, or all parts of a split, of which any may be named; then those that are named after it."""
        found = [path] if path.is_file() else []
        with suppress(BadFileError):
            found = list(read_parts(path).paths) if found else []
        named = (parts for parts in splits_of(path) if cls.provenance(parts[0]) is not None)
        return [*found, *(part for parts in named for part in parts)]

    @classmethod
    def obstacles(cls, recipe: Recipe) -> Iterator[Obstacle]:
        if recipe.activations.mode != "none":
            yield Obstacle("quern", gettext("runs a GGUF with activations as they are"))
