"""Formats: how quantized weights lie on disk so that some loader finds them.

A format has a writer, which owns its files; a reader, which alone knows what an artifact says of itself; and the runtimes
that it is for. Whoever makes or uses an artifact goes through these, and no reader needs the recipe.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from quern.checkpoint.files import write_json
from quern.checkpoint.tokenizer import copy_tokenizer
from quern.core.artifact import PROVENANCE
from quern.core.errors import UserError
from quern.core.packed import ActivationMode, PackedLinear
from quern.core.plan import Plan
from quern.core.recipe import Recipe
from quern.core.registry import Registry
from quern.core.results import Target
from quern.core.scheme import CodecScheme

if TYPE_CHECKING:
    from quern.architectures.base import Architecture
    from quern.checkpoint.checkpoint import Checkpoint
    from quern.checkpoint.jobs.work_folder import WorkFolder


UNNAMED = "model"
"""What the names of an artifact's files begin with that is no folder, until they get the name that was asked for."""


@dataclass(frozen=True)
class StoredModule:
    """What an artifact says of one module whose weight is stored as codes: all that a runtime must know to use it."""

    scheme: CodecScheme
    rotated: bool = False
    """Whether its inputs are rotated."""
    activations: ActivationMode = "none"
    """What its inputs become."""
    input_group: int | None = None
    """Inputs of a token that share a scale where activations are dynamic; None: all."""


@dataclass(frozen=True)
class StoredWeight:
    """What tables show of a quantized weight."""

    shape: tuple[int, ...]
    """Of the weight, not of its packed form."""
    codec: str
    granularity: str
    bits: float
    parts: tuple[str, ...]
    """Names of the tensors that it is made of."""


@dataclass(frozen=True)
class CodedPart:
    """What tables show of a tensor that is entropy-coded in its file."""

    bytes: int
    """In the file."""
    entropy_bits: float
    """Order-0 entropy of all its codes together, in bits."""


@dataclass(frozen=True)
class Obstacle:
    """Why a runtime does not run an artifact as it is."""

    target: Target
    reason: str
    """A clause, with what helps."""


class ArtifactWriter(ABC):
    """Writes one artifact, stage by stage: 0 is the embedding, 1 ... L are the blocks, L + 1 the final norm and the head.

    A stage's files are complete when ``end`` returns, and ``finish`` may run in another process than the stages did.
    """

    def __init__(self, recipe: Recipe, plan: Plan, architecture: Architecture) -> None:
        self.recipe, self.plan, self.architecture = recipe, plan, architecture

    codes_tensors: ClassVar[bool] = False
    """Whether the format knows the recipe's ``storage: entropy``."""

    def check(self) -> None:
        """Raise ``UserError`` with the reasons if the format cannot store the plan; before any work is done."""
        if self.recipe.storage == "entropy" and not self.codes_tensors:
            raise UserError(
                f"format {self.recipe.format} stores tensors as its readers map them, not entropy-coded. Leave out "
                "storage: entropy, or use format: quern"
            )

    @abstractmethod
    def begin(self, work: WorkFolder, stage: int) -> None:
        """Start a stage; files go below ``work.path("artifact")``."""

    @abstractmethod
    def put(self, module: str, linear: PackedLinear) -> None:
        """Store the quantized weight of ``module`` (full name)."""

    @abstractmethod
    def put_plain(self, name: str, tensor: Tensor) -> None:
        """Store a tensor (full name) as it is."""

    @abstractmethod
    def end(self) -> list[Path]:
        """Complete the stage; its files."""

    @abstractmethod
    def finish(self, work: WorkFolder, config: Mapping[str, Any], plan: Plan) -> None:
        """Write what makes the stages one artifact. ``config`` is the checkpoint's config.json; ``plan`` is what was
        carried out."""

    def prepare(self, checkpoint: Checkpoint, options: Mapping[str, str]) -> None:
        """Look at what goes along with the weights of ``checkpoint``, before any work is done, and at the format's own
        ``options``. Raises ``UserError`` for what it cannot say, and for options that it has not."""
        if options:
            raise UserError(
                f"format {self.recipe.format} has no options, and {next(iter(options))!r} is one. Leave it out"
            )

    def accompany(self, work: WorkFolder, provenance: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        """Write what goes along with the tensors: what was done, and the tokenizer. It comes last, after ``finish``."""
        folder = work.path("artifact")
        files = sorted(path.name for path in folder.iterdir())
        write_json(folder / PROVENANCE, {**provenance, "files": files})
        copy_tokenizer(checkpoint.path, folder)

    def joining(self, work: WorkFolder) -> dict[str, Any] | None:
        """The provenance that ``accompany`` got, where it has begun to make one file of the stages, which may be gone: then
        it only goes on. None else."""
        return None

    def saved_bytes(self, module: str) -> int:
        """How many bytes fewer than its parts have the stage that ended needs for ``module``."""
        return 0

    def coder(self) -> dict[str, str]:
        """Versions of what the files' bytes depend on besides the tensors."""
        return {}

    def notes(self) -> list[str]:
        """What whoever quantizes should know of the artifact's readers."""
        return []


class SizedWriter(ArtifactWriter):
    """A writer whose files' sizes are known before anything is quantized, so that plans are made for them."""

    @abstractmethod
    def encode(self, module: str, linear: PackedLinear) -> dict[str, Tensor]:
        """The tensors, by full name, that store ``module``."""

    def plain(self, tensor: Tensor) -> Tensor:
        """A tensor that is not quantized as it is stored, with another dtype if need be; it may have no memory."""
        return tensor

    def prepare_like(self, other: SizedWriter) -> None:
        """Take over what the ``prepare`` of a writer for the same checkpoint found."""

    @abstractmethod
    def companion_bytes(self, checkpoint: Checkpoint) -> int:
        """Bytes of what goes along with the weights of ``checkpoint``, whatever they become. ``prepare`` comes before."""

    @abstractmethod
    def artifact_bytes(
        self,
        stages: Sequence[dict[str, Tensor]],
        config: Mapping[str, Any],
        provenance: Mapping[str, Any],
        plan: Plan,
    ) -> int:
        """Bytes of all else: of the ``stages``, whose tensors need no memory, and of what is said of them. ``config`` is the
        checkpoint's config.json, ``provenance`` what ``accompany`` gets."""


class ArtifactReader(ABC):
    """What an artifact of one format says of itself. Made from its config.json; raises ``UserError`` for a damaged one."""

    through_transformers: ClassVar[bool] = False
    """Whether torch runs such artifacts by transformers' own classes; otherwise by quern's modules, from ``parts``."""

    def __init__(self, quantization: Mapping[str, Any], architecture: Architecture) -> None:
        self.quantization, self.architecture = quantization, architecture

    @abstractmethod
    def plan(self) -> dict[str, StoredModule]:
        """Every module whose weight is stored as codes, by full name."""

    @abstractmethod
    def problems(self, checkpoint: Checkpoint) -> list[str]:
        """Clauses that say how the tensors and the configuration contradict each other; none if all is well."""

    @abstractmethod
    def describe(self, checkpoint: Checkpoint) -> Iterator[tuple[str, StoredWeight]]:
        """Every quantized module and what tables show of it."""

    def coded(self, checkpoint: Checkpoint) -> Iterator[tuple[str, CodedPart]]:
        """Every entropy-coded tensor and what tables show of it; they are decoded for that. Raises ``BadFileError``."""
        return iter(())

    def parts(self, checkpoint: Checkpoint, module: str) -> dict[str, Tensor]:
        """The codec's parts of ``module``, with ``input_scale`` and ``input_signs`` where it has them."""
        raise NotImplementedError(f"transformers reads {module}")

    def load_model(self, checkpoint: Checkpoint, dtype: Any) -> Any:
        """transformers' model of the artifact; for formats that run through transformers. ``dtype``: a torch dtype or
        ``auto``. Raises ``UserError``."""
        raise NotImplementedError

    def recipe_name(self) -> str | None:
        """Name of the recipe, where the artifact says it."""
        recipe = self.quantization.get("recipe")
        name = recipe.get("name") if isinstance(recipe, dict) else None
        return name if isinstance(name, str) else None


class Format(ABC):
    """A way to lie on disk."""

    method: ClassVar[str]
    """``quant_method`` in ``quantization_config`` of config.json."""
    suffix: ClassVar[str | None] = None
    """Ending of the one file that an artifact is; None: it is a folder."""
    opened_as_values: ClassVar[bool] = False
    """Whether quern opens its artifacts as the values that their codes stand for, as it does what other tools
    quantized."""
    opened: ClassVar[bool] = True
    """Whether quern opens such artifacts; otherwise it only writes them, and what runs them is another program."""
    extra: ClassVar[str | None] = None
    """The optional dependency that loading this format needs, if any."""
    runtimes: ClassVar[tuple[Target, ...]] = ("quern",)
    """What loads it where nothing stands in the way."""
    joins: ClassVar[bool] = False
    """Whether linears that a runtime joins (``LinearSpec.fused_with``) must have one scheme."""
    joins_stages: ClassVar[bool] = False
    """Whether finished stages become one file, beside which they lie until it is whole."""
    moves_stages: ClassVar[bool] = False
    """Whether each of these stages is gone once it is in the file."""
    activations_dtype: ClassVar[str | None] = None
    """The dtype in which what runs its artifacts hands values from layer to layer; None: that of config.json."""
    writer: ClassVar[type[ArtifactWriter]]
    reader: ClassVar[type[ArtifactReader]]
    """Of a format that is not opened as values."""

    @classmethod
    def obstacles(cls, recipe: Recipe) -> Iterator[Obstacle]:
        """What keeps runtimes from running what ``recipe`` makes."""
        return iter(())

    @classmethod
    def provenance(cls, path: Path) -> dict[str, Any] | None:
        """What the file of an artifact says of what was done; None for a file that quern did not write."""
        return None

    @classmethod
    def tensor_bytes(cls, path: Path) -> int | None:
        """Bytes of the tensors of an artifact; None: those that quern finds where it opens it."""
        return None

    @classmethod
    def files(cls, path: Path) -> list[Path]:
        """The files of the artifact that was written as ``path``, that by which it is opened first; none where it is not."""
        return [path] if path.is_file() else []

    @classmethod
    def open_container(cls, folder: Path, config: dict[str, Any]) -> Any:
        """The tensors (a ``TensorSource``) of an artifact that does not keep them in safetensors files; else None."""
        return None


FORMATS: Registry[type[Format]] = Registry("format", "quern.formats")


def format_of(method: object) -> type[Format] | None:
    """The format whose artifacts name ``method`` as their ``quant_method`` and are read as they are stored; None for another
    tool's, and for what is opened as values."""
    readable = (found for name in FORMATS if (found := FORMATS.get(name)).opened and not found.opened_as_values)
    return next((found for found in readable if found.method == method), None)


def reader_of(quantization: Mapping[str, Any] | None, architecture: Architecture) -> ArtifactReader | None:
    """The reader of an artifact by its ``quantization_config``; None for an unquantized model or another tool's."""
    found = None if quantization is None else format_of(quantization.get("quant_method"))
    return None if found is None or quantization is None else found.reader(quantization, architecture)


def _by_suffix(path: Path) -> Iterator[type[Format]]:
    """Formats of files that are called like ``path``."""
    chosen = (FORMATS.get(name) for name in FORMATS)
    return (one for one in chosen if one.suffix is not None and path.name.lower().endswith(one.suffix))


def file_provenance(path: Path) -> dict[str, Any] | None:
    """What a file that is an artifact says of what was done; None for any other file."""
    return next((said for one in _by_suffix(path) if (said := one.provenance(path)) is not None), None)


def artifact_files(path: Path) -> list[Path]:
    """``Format.files`` of the format whose files are called like ``path``; of no format: ``path``, if it is a file."""
    chosen = next(_by_suffix(path), Format)
    return chosen.files(path)


def open_container(folder: Path, config: dict[str, Any]) -> Any:
    """The tensors of a folder that some format keeps in files of its own kind; None where none does."""
    opened = (FORMATS.get(name).open_container(folder, config) for name in FORMATS)
    return next((source for source in opened if source is not None), None)


def runtimes_of(recipe: Recipe) -> tuple[Target, ...]:
    """The runtimes that load what ``recipe`` writes and compute with it what quern does, without further settings."""
    if recipe.format not in FORMATS.names():
        return ("quern",)
    chosen = FORMATS.get(recipe.format)
    stopped = {obstacle.target for obstacle in chosen.obstacles(recipe)}
    return tuple(target for target in chosen.runtimes if target not in stopped)


def obstacles_of(recipe: Recipe) -> Sequence[Obstacle]:
    """What keeps runtimes of the recipe's format from running the artifact."""
    return tuple(FORMATS.get(recipe.format).obstacles(recipe)) if recipe.format in FORMATS.names() else ()
