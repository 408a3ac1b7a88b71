"""What formats share that keep their tensors in safetensors shards: one a stage, an index, and a ``quantization_config``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from quern.checkpoint.files import write_json
from quern.checkpoint.folder import CONFIG, INDEX
from quern.checkpoint.safetensors_file import read_header
from quern.checkpoint.work_folder import WorkFolder
from quern.core.packed import PackedLinear
from quern.core.plan import Plan
from quern.formats.base import ArtifactWriter


class ShardedWriter(ArtifactWriter):
    """A subclass says which tensors store a module and what config.json says of them."""

    @abstractmethod
    def encode(self, module: str, linear: PackedLinear) -> dict[str, Tensor]:
        """The tensors, by full name, that store ``module``."""

    @abstractmethod
    def quantization_config(self, plan: Plan) -> dict[str, Any]:
        """What goes into config.json; ``plan`` is what was carried out."""

    def further_files(self, plan: Plan) -> dict[str, Any]:
        """JSON files, by name, that some loaders look for beside config.json; ``plan`` is what was carried out."""
        return {}

    def config_entry(self, work: WorkFolder, plan: Plan) -> dict[str, Any] | None:
        """What goes into config.json in the end; None for an artifact that is an ordinary checkpoint."""
        return self.quantization_config(plan) if plan.quantized() else None

    def begin(self, work: WorkFolder, stage: int) -> None:
        self._work, self._stage = work, stage
        self._tensors: dict[str, Tensor] = {}

    def put(self, module: str, linear: PackedLinear) -> None:
        self._tensors |= self.encode(module, linear)

    def put_plain(self, name: str, tensor: Tensor) -> None:
        self._tensors[name] = tensor

    def end(self) -> list[Path]:
        tensors, self._tensors = self._tensors, {}
        return [self._work.write_tensors(f"artifact/{self.shard(self._stage).removesuffix('.safetensors')}", tensors)]

    def finish(self, work: WorkFolder, config: Mapping[str, Any], plan: Plan) -> None:
        weight_map, total = {}, 0
        for stage in range(self.architecture.layers + 2):
            for name, info in read_header(work.path("artifact", self.shard(stage))).items():
                weight_map[name] = self.shard(stage)
                total += info.stored_bytes
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(work.path("artifact", INDEX), index)
        said = self.config_entry(work, plan)
        write_json(work.path("artifact", CONFIG), config if said is None else {**config, "quantization_config": said})
        for name, content in ({} if said is None else self.further_files(plan)).items():
            write_json(work.path("artifact", name), content)

    def shard(self, stage: int) -> str:
        """The file of a stage."""
        return f"model-{stage + 1:05d}-of-{self.architecture.layers + 2:05d}.safetensors"
