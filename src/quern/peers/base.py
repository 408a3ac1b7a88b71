"""What every adapter of another quantization tool declares and does.

An adapter is one file. quern imports it to know what the tool can do; a process in the tool's own environment
(``quern.peers.worker``) imports the same file and calls ``quantize`` and ``load``. So the top of an adapter imports nothing
but the standard library, numpy and quern's core; the tool is imported inside the methods.
"""

from __future__ import annotations

import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from quern.core.engine import LoadedModel
from quern.core.errors import UserError, option
from quern.core.registry import Registry
from quern.core.results import Target
from quern.core.text.suggest import did_you_mean

TORCH = "torch==2.13.0"
"""Installed first in every environment, and in no lock: which build of it is right depends on the machine."""
BUILD = ("setuptools", "wheel")
"""What a source distribution is built with unless it asks for something else."""
COMMON = ("numpy", "pydantic>=2.10", "psutil>=6.0", "transformers>=5.0", "accelerate>=1.2", "safetensors>=0.5")
"""What measuring needs in every environment, beside torch."""

PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input")
LOCKED = ("--no-deps", "--require-hashes")
"""pip takes what a lock names and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of using a tool, which makes one row."""

    name: str
    """Within the tool, such as ``int4-g64``; the row is called ``<peer>-<name>``."""
    bits: float
    """Nominal bits of a weight's code, without scales; the row counts the real ones."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the adapter hands to the tool, in the tool's own words; plain JSON values."""
    calibrated: bool = False
    """Whether the calibration text is used."""
    default: bool = True
    """Whether naming the tool alone asks for this variant."""


@dataclass(frozen=True, kw_only=True)
class ToolJob:
    """What an adapter is given to quantize."""

    model: Path
    """A Hugging Face folder of an unquantized checkpoint."""
    output: Path
    """An empty folder; whatever lies there afterwards is the artifact, and its size is counted."""
    variant: Variant
    sequences: NDArray[np.int64]
    """Calibration token ids ``(sequences, time)``, the same ones for every tool and for quern's own recipes."""
    text: Path
    """The same sequences as UTF-8 text, for tools that tokenize themselves."""
    threads: int
    seed: int


class Peer(ABC):
    """An adapter. The class attributes are its declaration."""

    tool: ClassVar[str]
    """The tool's name as its makers write it."""
    package: ClassVar[str]
    """The distribution whose version is the tool's version."""
    also: ClassVar[tuple[str, ...]] = ()
    """Further distributions whose versions matter, such as one that does the quantizing; in PEP 503's spelling."""
    modules: ClassVar[tuple[str, ...]]
    """What the adapter imports of the tool."""
    versions: ClassVar[str]
    """Versions that the adapter is written for (PEP 440 specifier)."""
    requirements: ClassVar[tuple[str, ...]]
    """What its environment is for, exact versions; ``locks/NAME.txt`` holds these, ``BUILD``, ``COMMON`` and all that they
    need (``make lock-peers``)."""
    sources: ClassVar[tuple[str, ...]] = ()
    """Distributions that there is no wheel of, in PEP 503's spelling: built in the environment, with what it holds."""
    licence: ClassVar[str]
    """SPDX identifier of the tool's licence."""
    homepage: ClassVar[str]
    runtime: ClassVar[str]
    """In which runtime its artifacts are measured here."""
    targets: ClassVar[tuple[Target, ...]]
    """Runtimes that load its artifacts."""
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    variants: ClassVar[tuple[Variant, ...]]
    environment: ClassVar[Mapping[str, str]] = {}
    """Environment variables that the tool needs to work here."""

    def build(self, prefix: Path, run: Callable[[Sequence[str]], None], sources: Path) -> None:
        """Install what there is no wheel of, once everything else is there.

        ``prefix`` is the environment's folder, ``run`` raises for a command that fails, and the file ``sources`` names
        the distributions ``self.sources`` for pip, with hashes.
        """
        if self.sources:
            run([str(prefix / "bin" / "python"), *PIP, "install", *LOCKED, "--no-build-isolation", "-r", str(sources)])

    def start(self) -> None:
        """Import the tool: whatever this raises is the reason why it cannot run. Runs in the tool's environment."""
        for module in self.modules:
            importlib.import_module(module)

    def remarks(self, variant: Variant) -> Sequence[str]:
        """What a reader of the row has to know about ``variant``, whenever its artifact was made."""
        return ()

    @abstractmethod
    def quantize(self, job: ToolJob) -> Sequence[str]:
        """Quantize and save the tool's own artifact into ``job.output``; notes for the row.

        Runs in the tool's environment. Any exception becomes the reason of a failed row.
        """

    @abstractmethod
    def load(self, folder: Path, threads: int) -> LoadedModel:
        """The artifact in the tool's own best runtime. Runs in the tool's environment."""

    def variant(self, name: str) -> Variant:
        """The variant called ``name``. Raises ``UserError``."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        known = [variant.name for variant in self.variants]
        raise UserError(f"{self.tool} has no variant {name!r}; known: {', '.join(known)}{did_you_mean(name, known)}")


PEERS: Registry[type[Peer]] = Registry("peer", "quern.peers.adapters")
"""Adapters by the name that ``--peers`` takes."""

ALL = "all"


@dataclass(frozen=True)
class PeerVariant:
    """A tool and one of its variants."""

    peer: str
    variant: Variant

    @property
    def row(self) -> str:
        """The name of its row."""
        return f"{self.peer}-{self.variant.name}"

    def recipe(self) -> dict[str, Any]:
        """What stands in ``results.json`` where quern's rows have their recipe."""
        return {"peer": self.peer, **asdict(self.variant)}


def peer_variants(wanted: Sequence[str]) -> list[PeerVariant]:
    """``hqq`` means the tool's default variants, ``hqq:int4-g64`` one of them, ``all`` every tool's default ones.

    Raises ``UserError`` for an unknown tool or variant, and for one named twice.
    """
    found: list[PeerVariant] = []
    for word in wanted:
        name, _, variant = word.partition(":")
        for peer in PEERS.names() if word == ALL else [name]:
            adapter = PEERS.get(peer)()
            picked = [adapter.variant(variant)] if variant else [v for v in adapter.variants if v.default]
            found += [PeerVariant(peer, one) for one in picked]
    rows = [each.row for each in found]
    if repeated := sorted({row for row in rows if rows.count(row) > 1}):
        raise UserError(f"{option('peers', '--peers')} names {', '.join(repeated)} twice; name each once")
    return found


NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
"""Names of peers and variants: they become names of rows and folders."""
