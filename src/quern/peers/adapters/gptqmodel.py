"""GPTQModel (GPT-QModel): GPTQ with activation-aware order of groups (https://github.com/ModelCloud/GPTQModel)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quern.core.engine import LoadedModel
from quern.peers.base import PEERS, Peer, ToolJob, Variant
from quern.peers.transformers_model import TransformersModel, dense_matrices


@PEERS.add("gptqmodel")
class GptqModel(Peer):
    """Linears of the decoder blocks; the embedding and the head stay as they are."""

    tool = "GPTQModel"
    package = "gptqmodel"
    modules = ("gptqmodel",)
    versions = ">=7.6.0,<7.7"
    requirements = ("transformers==5.23.0", "ninja==1.13.2", "gptqmodel==7.6.0")
    sources = ("gptqmodel", "defuser", "device-smi", "logbar", "pypcre", "tokenicer")
    licence = "Apache-2.0"
    homepage = "https://github.com/ModelCloud/GPTQModel"
    runtime = "transformers with GPTQModel's CPU kernels"
    targets = ("transformers", "vllm")
    devices = ("cpu", "cuda")
    variants = (
        Variant(name="gptq-int4-g64", bits=4, settings={"bits": 4, "group_size": 64}, calibrated=True),
        Variant(name="gptq-int3-g64", bits=3, settings={"bits": 3, "group_size": 64}, calibrated=True),
        Variant(name="gptq-int2-g64", bits=2, settings={"bits": 2, "group_size": 64}, calibrated=True, default=False),
        Variant(name="gptq-int8-g64", bits=8, settings={"bits": 8, "group_size": 64}, calibrated=True, default=False),
    )
    # Its thread pool refuses to start on machines with few cores unless it is told how many workers to use.
    environment = {"GPTQMODEL_CPU_WORKERS": "2"}

    def quantize(self, job: ToolJob) -> Sequence[str]:
        from gptqmodel import GPTQModel, QuantizeConfig

        # Without a place of its own it fills the system's temporary folder and leaves it full.
        config = QuantizeConfig(**job.variant.settings, offload_to_disk_path="offloaded")
        model = GPTQModel.load(str(job.model), config, device="cpu")
        rows = job.sequences.tolist()
        model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1)
        model.save(str(job.output))
        return [dense_matrices(job.output)]

    def load(self, folder: Path, threads: int) -> LoadedModel:
        import torch
        from gptqmodel import BACKEND, GPTQModel

        loaded = TransformersModel(GPTQModel.load(str(folder), backend=BACKEND.AUTO, device="cpu").model)
        for length in (1, 2, 3):  # the first products repack weights for the kernel, or compile what unpacks them
            loaded.logits(torch.zeros(1, length, dtype=torch.int64))
        return loaded
