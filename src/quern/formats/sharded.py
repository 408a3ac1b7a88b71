"""What formats share that keep their tensors in safetensors shards: one a stage, an index, and a ``quantization_config``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.files import json_bytes, write_json
from quern.checkpoint.folder import CONFIG, INDEX
from quern.checkpoint.jobs.work_folder import WorkFolder
from quern.checkpoint.safetensors_file import METADATA, file_bytes, read_header
from quern.checkpoint.tokenizer import copy_tokenizer
from quern.core.machine.temporary import temporary_folder
from quern.core.packed import PackedLinear
from quern.core.plan import Plan
from quern.formats.base import SizedWriter


class ShardedWriter(SizedWriter):
    """A subclass says which tensors store a module and what config.json says of them."""

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

    def companion_bytes(self, checkpoint: Checkpoint) -> int:
        with temporary_folder("tokenizer") as folder:
            return sum(path.stat().st_size for path in copy_tokenizer(checkpoint.path, folder))

    def artifact_bytes(
        self,
        stages: Sequence[dict[str, Tensor]],
        config: Mapping[str, Any],
        provenance: Mapping[str, Any],
        plan: Plan,
    ) -> int:
        names = [self.shard(stage) for stage in range(len(stages))]
        places = {name: shard for stage, shard in zip(stages, names, strict=True) for name in stage}
        total = sum(tensor.nbytes for stage in stages for tensor in stage.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        said = {"quantization_config": self.quantization_config(plan)} if plan.quantized() else {}
        further = self.further_files(plan) if plan.quantized() else {}
        files = {"files": sorted([*names, INDEX, CONFIG, *further])}
        texts = (index, {**config, **said}, {**provenance, **files}, *further.values())
        return sum(file_bytes(stage, METADATA) for stage in stages) + sum(len(json_bytes(text)) for text in texts)

    def shard(self, stage: int) -> str:
        """The file of a stage."""
        return f"model-{stage + 1:05d}-of-{self.architecture.layers + 2:05d}.safetensors"
