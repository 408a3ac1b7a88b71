"""Stages become one GGUF, or parts of it: tensor after tensor moves, and a stage that has moved is gone, so that both
together take little more room than the file.

What the file will hold is a step of the work folder before the first tensor moves, and every stage that has moved is one:
a kill costs the stage in hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from quern.checkpoint.gguf.writing.container import TensorPlan, append_tensor, begin_gguf
from quern.checkpoint.jobs.work_folder import WorkFolder
from quern.checkpoint.safetensors_file import TensorInfo, read_header, read_tensor
from quern.core.errors import UserError, option

LAYOUT = "layout"


@dataclass(frozen=True)
class Layout:
    """What stages will be in the file."""

    stages: list[list[TensorPlan]]
    """Of each stage its tensors, in the order of the file."""
    file_type: int
    provenance: dict[str, Any]
    """What the file says of what was done."""

    @classmethod
    def known(cls, work: WorkFolder) -> Layout | None:
        """That of a file into which stages have begun to move."""
        data = work.done(LAYOUT)
        if data is None:
            return None
        stages = [[TensorPlan(name, tuple(shape), kind) for name, shape, kind in stage] for stage in data["stages"]]
        return cls(stages, data["file_type"], data["provenance"])

    def keep(self, work: WorkFolder) -> None:
        """Make it the step from which on stages may be gone."""
        stages = [[[tensor.name, list(tensor.shape), tensor.kind] for tensor in stage] for stage in self.stages]
        work.finish(LAYOUT, [], {"stages": stages, "file_type": self.file_type, "provenance": self.provenance})

    @property
    def tensors(self) -> list[TensorPlan]:
        """All, in the order of the file."""
        return [tensor for stage in self.stages for tensor in stage]


@dataclass(frozen=True)
class StageFile:
    """A finished stage, read tensor by tensor; ``before``: tensors that stand in front of its own."""

    path: Path
    before: tuple[Tensor, ...] = ()

    def described(self) -> dict[str, TensorInfo]:
        """Its own tensors by name, in order."""
        return read_header(self.path)

    def tensors(self) -> Iterator[Tensor]:
        """All, one of them in memory at a time."""
        yield from self.before
        for info in self.described().values():
            yield read_tensor(self.path, info)


@dataclass(frozen=True)
class GgufFile:
    """A file that is to be written."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Sequence[TensorPlan]


def join(work: WorkFolder, files: Sequence[GgufFile], layout: Layout, stages: Sequence[StageFile]) -> None:
    """Move all ``stages`` into the ``files`` (inside the work folder), or go on with that."""
    pen = _Pen(files)
    for index, (stage, tensors) in enumerate(zip(stages, layout.stages, strict=True)):
        step = f"joined {index}"
        if (known := work.done(step)) is not None:
            pen.skip(len(tensors), known["end"])
        elif stage.path.is_file():
            touched = pen.write(zip(tensors, stage.tensors(), strict=True))
            work.grow(step, touched, {"end": pen.end})
        else:
            raise UserError(
                f"the work folder {work.folder} lost what {stage.path.name} held. Start over with "
                f"{option('fresh=True', '--fresh')}"
            )
        stage.path.unlink(missing_ok=True)


class _Pen:
    """Where the next tensor goes."""

    def __init__(self, files: Sequence[GgufFile]) -> None:
        self._files = files
        self._file = 0
        self._count = 0
        self.end = 0
        """Bytes that are right of the file in hand."""

    def skip(self, count: int, end: int) -> None:
        """Go past tensors that are written, after which the file in hand has ``end`` bytes."""
        for _ in range(count):
            self._turn()
            self._count += 1
        self.end = end

    def write(self, tensors: Iterable[tuple[TensorPlan, Tensor]]) -> list[Path]:
        """Write tensors; the files that they went into."""
        touched: dict[Path, None] = {}
        for plan, values in tensors:
            file = self._turn()
            if self._count == 0:
                self.end = begin_gguf(file.path, file.metadata, file.tensors)
            self.end = append_tensor(file.path, self.end, plan, values)
            self._count += 1
            touched[file.path] = None
        return list(touched)

    def _turn(self) -> GgufFile:
        """The file of the next tensor."""
        if self._count == len(self._files[self._file].tensors):
            self._file, self._count = self._file + 1, 0
        return self._files[self._file]
