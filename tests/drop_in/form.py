"""A format with a container of its own: all tensors in one zip archive (dropped into formats/)."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quern.checkpoint.files import write_json
from quern.checkpoint.jobs.work_folder import WorkFolder
from quern.checkpoint.safetensors_file import DTYPES, TensorInfo
from quern.core.packed import PackedLinear
from quern.core.plan import Plan
from quern.formats.base import FORMATS, Format
from quern.formats.quern import QuernReader, QuernWriter

METHOD, ARCHIVE, HEADER = "zipped", "model.zip", "header.json"
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ZippedWriter(QuernWriter):
    """An archive for each stage, then one of them all."""

    def begin(self, work: WorkFolder, stage: int) -> None:
        self.stage_file, self.held = work.path("stages", f"{stage}.zip"), {}
        self.stage_file.parent.mkdir(exist_ok=True)

    def put(self, module: str, linear: PackedLinear) -> None:
        self.held |= self.encode(module, linear)

    def put_plain(self, name: str, tensor: Tensor) -> None:
        self.held[name] = tensor

    def end(self) -> list[Path]:
        header = {name: [NAMES[tensor.dtype], list(tensor.shape)] for name, tensor in self.held.items()}
        with zipfile.ZipFile(self.stage_file, "w") as archive:
            archive.writestr(HEADER, json.dumps(header))
            for name, tensor in self.held.items():
                archive.writestr(name, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return [self.stage_file]

    def finish(self, work: WorkFolder, config: Mapping[str, Any], plan: Plan) -> None:
        header: dict[str, Any] = {}
        work.path("artifact").mkdir(exist_ok=True)
        with zipfile.ZipFile(work.path("artifact", ARCHIVE), "w") as whole:
            for stage in range(self.architecture.layers + 2):
                with zipfile.ZipFile(work.path("stages", f"{stage}.zip")) as part:
                    header |= json.loads(part.read(HEADER))
                    for name in part.namelist():
                        if name != HEADER:
                            whole.writestr(name, part.read(name))
            whole.writestr(HEADER, json.dumps(header))
        said = {**self.quantization_config(plan), "quant_method": METHOD}
        write_json(work.path("artifact", "config.json"), {**config, "quantization_config": said})


@dataclass(frozen=True)
class ZippedSource:
    """Tensors in an archive."""

    path: Path
    infos: Mapping[str, TensorInfo]

    @property
    def weight_files(self) -> tuple[Path, ...]:
        return (self.path,)

    def place(self, name: str) -> Path:
        return self.path

    def plain(self, name: str) -> bool:
        return False

    def read(self, name: str) -> Tensor:
        with zipfile.ZipFile(self.path) as archive:
            raw = bytearray(archive.read(name))
        return torch.frombuffer(raw, dtype=DTYPES[self.infos[name].dtype]).view(self.infos[name].shape)


@FORMATS.add("zipped")
class Zipped(Format):
    """For those who like one file."""

    method = METHOD
    writer = ZippedWriter
    reader = QuernReader

    @classmethod
    def open_container(cls, folder: Path, config: dict[str, Any]) -> Any:
        path = folder / ARCHIVE
        if not path.is_file():
            return None
        with zipfile.ZipFile(path) as archive:
            header = json.loads(archive.read(HEADER))
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        infos = {name: TensorInfo(dtype, tuple(shape), 0, sizes[name]) for name, (dtype, shape) in header.items()}
        return ZippedSource(path, infos)
