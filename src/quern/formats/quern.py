"""Quern's own format: the codec's parts as they are, and what a reader must know of every module in config.json.

Described byte for byte in docs/format.md. transformers loads it once ``import quern`` has registered the plug-in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from quern.architectures.base import Architecture
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.files import read_json, write_json
from quern.checkpoint.folder import CONFIG, open_tensors
from quern.checkpoint.jobs.work_folder import WorkFolder
from quern.codecs.base import ScaledParameters, codec_of
from quern.core.errors import BadFileError, UserError
from quern.core.packed import PackedLinear
from quern.core.plan import LinearPlan, Plan
from quern.core.recipe import Recipe, parse_recipe
from quern.core.results import Target
from quern.core.scheme import CodecScheme, parse_scheme
from quern.core.text.language import gettext, translatable
from quern.formats.base import FORMATS, ArtifactReader, CodedPart, Format, Obstacle, StoredModule, StoredWeight
from quern.formats.entropy.coded_source import CodedSource, parse_storage, storage_json
from quern.formats.entropy.entropy import coder_version, encode, zstandard
from quern.formats.fit import Expected, differences, plain
from quern.formats.sharded import ShardedWriter

METHOD = "quern"
VERSION = 3
"""``format_version`` that is written where that says it all."""
WIDER_VERSION = 4
"""Written where a module's int8 activations are beyond version 3, which knows them per token or tensor and in front of 8-bit
weights with one scale a row or a matrix."""
CODED_VERSION = 5
"""That of artifacts with entropy-coded tensors."""
READ_VERSIONS = (1, 2, 3, 4, 5)
"""Versions that are read: 1 had neither trellis codes nor rotations, and 1 and 2 said of the model as a whole what 3 says
of each module. 5 adds to 4 how tensors are coded."""
INPUT_GROUP = "input_group"
"""Key of a module, from version 4 on: inputs of a token that share a scale."""
STORAGE = "storage"
"""Key of ``quantization_config`` that says it."""
INPUT_SCALE = "input_scale"
"""Last part of a tensor's name: the scale of static activations."""
INPUT_SIGNS = "input_signs"
"""The packed signs of the rotation that a module's inputs want."""

OWN_READER = translatable("reads the files itself and does not decode entropy-coded tensors")
"""Why transformers does not load such artifacts."""


class QuernWriter(ShardedWriter):
    """``<module>.<part>`` for every part, ``<module>.input_scale`` float32 ``()`` for static activations, and
    ``<module>.input_signs`` uint8 ``(ceil(columns / 8),)`` for rotated inputs.

    With the recipe's ``storage: entropy`` tensors that this makes smaller are coded as a stage ends. How is kept beside the
    stage until all are done.
    """

    codes_tensors = True

    def __init__(self, recipe: Recipe, plan: Plan, architecture: Architecture) -> None:
        super().__init__(recipe, plan, architecture)
        self._code_bits: dict[str, int] = {}
        self._saved: Counter[str] = Counter()

    def check(self) -> None:
        if self.recipe.storage == "entropy":
            zstandard()

    def coder(self) -> dict[str, str]:
        return {"zstd": coder_version()} if self.recipe.storage == "entropy" else {}

    def begin(self, work: WorkFolder, stage: int) -> None:
        super().begin(work, stage)
        self._code_bits, self._saved = {}, Counter()

    def put(self, module: str, linear: PackedLinear) -> None:
        super().put(module, linear)
        bits = codec_of(linear.weight.scheme).code_bits()
        self._code_bits |= {f"{module}.{part}": count for part, count in bits.items()}

    def end(self) -> list[Path]:
        if self.recipe.storage == "plain":
            return super().end()
        codings = {}
        for name, tensor in self._tensors.items():
            if (coded := encode(tensor, self._code_bits.get(name, 8))) is not None:
                self._tensors[name], codings[name] = coded
                self._saved[name.rpartition(".")[0]] += tensor.nbytes - coded[0].nbytes
        described = self._description(self._work, self._stage)
        write_json(described, storage_json(codings))
        return [*super().end(), described]

    def saved_bytes(self, module: str) -> int:
        return self._saved[module]

    def _description(self, work: WorkFolder, stage: int) -> Path:
        return work.path(STORAGE, f"{stage:05d}.json")

    def config_entry(self, work: WorkFolder, plan: Plan) -> dict[str, Any] | None:
        if self.recipe.storage == "plain":
            return super().config_entry(work, plan)
        stages = (read_json(self._description(work, stage)) for stage in range(self.architecture.layers + 2))
        codings = {name: coding for described in stages for name, coding in parse_storage(described).items()}
        said = {**self.quantization_config(plan), STORAGE: storage_json(codings)}
        return {**said, "format_version": CODED_VERSION}

    def encode(self, module: str, linear: PackedLinear) -> dict[str, Tensor]:
        tensors = {f"{module}.{name}": part for name, part in linear.weight.parts.items()}
        if linear.input_scale is not None:
            tensors[f"{module}.{INPUT_SCALE}"] = torch.tensor(linear.input_scale, dtype=torch.float32)
        if linear.input_signs is not None:
            tensors[f"{module}.{INPUT_SIGNS}"] = linear.input_signs
        return tensors

    def quantization_config(self, plan: Plan) -> dict[str, Any]:
        modules = {
            module: {
                "weights": chosen.scheme.to_json(),
                "rotated": chosen.rotation is not None,
                "activations": chosen.activations.mode,
                **({INPUT_GROUP: size} if (size := chosen.activations.group_size) else {}),
            }
            for module, chosen in sorted(plan.quantized().items())
        }
        return {
            "quant_method": METHOD,
            "format_version": WIDER_VERSION if any(map(_is_wider, plan.quantized().values())) else VERSION,
            "recipe": self.recipe.to_json(),
            "modules": modules,
        }


class QuernReader(ArtifactReader):
    """Reads every version that this package has written."""

    def __init__(self, quantization: Mapping[str, Any], architecture: Architecture) -> None:
        super().__init__(quantization, architecture)
        version = quantization.get("format_version")
        if type(version) is not int or version not in READ_VERSIONS:
            known = f"{', '.join(map(str, READ_VERSIONS[:-1]))} and {READ_VERSIONS[-1]}"
            raise UserError(
                f"the artifact has quern format version {version!r}; this quern reads versions {known}. "
                "Install the quern that wrote it, or quantize the checkpoint again"
            )
        try:
            self._modules = self._versions_1_and_2() if version < 3 else self._from_version_3(version)
            if version >= CODED_VERSION:
                parse_storage(quantization[STORAGE])
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise UserError(f"the artifact's quantization_config is damaged: {error}") from None

    def _from_version_3(self, version: int) -> dict[str, StoredModule]:
        found = {}
        for module, entry in self.quantization["modules"].items():
            optional = {INPUT_GROUP} if version >= WIDER_VERSION else set()
            if set(entry) - optional != {"weights", "rotated", "activations"}:
                raise ValueError(f"module {module!r} is described by {', '.join(map(str, entry))}")
            rotated, mode = entry["rotated"], entry["activations"]
            if type(rotated) is not bool or mode not in ("none", "dynamic", "static"):
                raise ValueError(f"module {module!r} has rotated {rotated!r} and activations {mode!r}")
            found[module] = StoredModule(_scheme(entry["weights"]), rotated, mode, _input_group(module, entry))
        return found

    def _versions_1_and_2(self) -> dict[str, StoredModule]:
        """What these say of the inputs of all modules in decoder blocks stands in their recipe."""
        recipe = parse_recipe(self.quantization.get("recipe"), "of the artifact")
        outer = (self.architecture.embedding, self.architecture.head)
        return {
            module: StoredModule(_scheme(scheme))
            if module in outer
            else StoredModule(_scheme(scheme), recipe.rotated, recipe.activations.mode)
            for module, scheme in self.quantization["modules"].items()
        }

    def plan(self) -> dict[str, StoredModule]:
        return self._modules

    def problems(self, checkpoint: Checkpoint) -> list[str]:
        return differences(checkpoint, self.architecture, self.expected())

    def expected(self) -> dict[str, Expected]:
        """The tensors of the artifact. Raises ``UserError`` for modules that the model does not have."""
        expected = plain(self.architecture.module_shapes())
        allowed = {*self.architecture.linears, *self.architecture.outer}
        for module, stored in self._modules.items():
            found = expected.pop(f"{module}.weight", None)
            if found is None:
                raise UserError(f"the artifact names a module {module!r} that the model does not have")
            if module not in allowed:
                raise UserError(f"the artifact quantizes {module!r}, which is neither a linear nor an embedding")
            rows, columns = found.shape
            sizes = codec_of(stored.scheme).part_shapes((rows, columns))
            expected |= {f"{module}.{part}": Expected(tuple(s), frozenset((d,))) for part, (s, d) in sizes.items()}
            if stored.activations == "static":
                expected[f"{module}.{INPUT_SCALE}"] = Expected((), frozenset((torch.float32,)))
            if stored.rotated:
                expected[f"{module}.{INPUT_SIGNS}"] = Expected((-(-columns // 8),), frozenset((torch.uint8,)))
        return expected

    def describe(self, checkpoint: Checkpoint) -> Iterator[tuple[str, StoredWeight]]:
        shapes = self.architecture.module_shapes()
        for module, stored in self._modules.items():
            shape = shapes.get(f"{module}.weight", ())
            if len(shape) != 2:
                raise BadFileError(
                    checkpoint.path / "config.json",
                    f"module {module!r} is no linear or embedding of this model",
                    "Quantize the model again, or get its files again",
                )
            codec = codec_of(stored.scheme)
            names = tuple(f"{module}.{part}" for part in codec.part_shapes((shape[0], shape[1])))
            said = codec.describe()
            yield module, StoredWeight(shape, stored.scheme.codec, said.granularity, said.bits, names)

    def coded(self, checkpoint: Checkpoint) -> Iterator[tuple[str, CodedPart]]:
        source = checkpoint.source
        if not isinstance(source, CodedSource):
            return
        bits = {
            f"{module}.{part}": count
            for module, stored in self._modules.items()
            for part, count in codec_of(stored.scheme).code_bits().items()
        }
        for name in source.codings:
            yield name, CodedPart(source.infos[name].stored_bytes, source.entropy(name, bits.get(name, 8)))

    def parts(self, checkpoint: Checkpoint, module: str) -> dict[str, Tensor]:
        stored = self._modules[module]
        rows, columns = self.architecture.module_shapes()[f"{module}.weight"]
        names = [*codec_of(stored.scheme).part_shapes((rows, columns))]
        names += [INPUT_SCALE] * (stored.activations == "static") + [INPUT_SIGNS] * stored.rotated
        return {name: checkpoint.read(f"{module}.{name}") for name in names}


def _is_wider(plan: LinearPlan) -> bool:
    """Whether a module's int8 activations are beyond what version 3 says."""
    params, activations = plan.scheme.params, plan.activations
    if activations.mode == "none":
        return False
    former = isinstance(params, ScaledParameters) and params.bits == 8 and params.granularity != "group"
    return activations.group_size is not None or not former


def _input_group(module: str, entry: Mapping[str, Any]) -> int | None:
    """Inputs of a token that share a scale. Raises ``ValueError`` for what its weights do not go with."""
    params = parse_scheme(entry["weights"]).params
    if entry["activations"] != "none" and (obstacle := params.int8_obstacle()):
        raise ValueError(f"module {module!r} has int8 activations and {obstacle}")
    if INPUT_GROUP not in entry:
        return None
    size = entry[INPUT_GROUP]
    if type(size) is not int or size < 1 or entry["activations"] != "dynamic":
        raise ValueError(f"module {module!r} has {INPUT_GROUP} {size!r} and activations {entry['activations']!r}")
    if obstacle := params.input_group_obstacle(size):
        raise ValueError(f"module {module!r} has groups of {size} int8 activations and {obstacle}")
    return size


def _scheme(values: object) -> CodecScheme:
    scheme = parse_scheme(values)
    if not scheme.quantized:
        raise ValueError("a module is listed that is not quantized")
    return scheme


@FORMATS.add("quern")
class QuernFormat(Format):
    """Quern's own."""

    method = METHOD
    runtimes: ClassVar[tuple[Target, ...]] = ("quern", "transformers")
    writer = QuernWriter
    reader = QuernReader

    @classmethod
    def obstacles(cls, recipe: Recipe) -> Iterator[Obstacle]:
        if recipe.storage == "entropy":
            yield Obstacle("transformers", gettext("{reason}; leave out storage: entropy", reason=gettext(OWN_READER)))

    @classmethod
    def open_container(cls, folder: Path, config: dict[str, Any]) -> CodedSource | None:
        found = config.get("quantization_config")
        if not isinstance(found, dict) or (found.get("quant_method"), found.get("format_version")) != (
            METHOD,
            CODED_VERSION,
        ):
            return None
        try:
            codings = parse_storage(found.get(STORAGE))
        except ValueError as error:
            hint = "The artifact is damaged; get its files again, or quantize again"
            raise BadFileError(folder / CONFIG, f"has an unusable quantization_config: {error}", hint) from None
        return CodedSource(open_tensors(folder), codings)
