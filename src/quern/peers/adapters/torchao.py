"""torchao: PyTorch's own quantization, without calibration (https://github.com/pytorch/ao)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quern.core.engine import LoadedModel
from quern.peers.base import PEERS, Peer, ToolJob, Variant
from quern.peers.transformers_model import TransformersModel, copy_tokenizer

WARM_UP = ([1] * 32, [1], [1], [1])
"""A prompt and single tokens: each is compiled apart, and once more when the cache has grown."""


@PEERS.add("torchao")
class Torchao(Peer):
    """Linears only; the embedding and the head stay as they are. Its packed 4-bit kernels want a GPU library."""

    tool = "torchao"
    package = "torchao"
    modules = ("torchao.quantization",)
    versions = ">=0.18,<0.19"
    requirements = ("transformers==5.23.0", "torchao==0.18.0")
    licence = "BSD-3-Clause"
    homepage = "https://github.com/pytorch/ao"
    runtime = "transformers with torchao's tensors"
    targets = ("transformers", "vllm")
    devices = ("cpu", "cuda")
    variants = (
        Variant(name="int8", bits=8, settings={"config": "Int8WeightOnlyConfig"}),
        Variant(name="w8a8", bits=8, settings={"config": "Int8DynamicActivationInt8WeightConfig"}),
        Variant(
            name="intx4-g32",
            bits=4,
            settings={"config": "IntxWeightOnlyConfig", "weight_dtype": "int4", "group_size": 32},
            default=False,
        ),
    )

    def quantize(self, job: ToolJob) -> Sequence[str]:
        from transformers import AutoModelForCausalLM, TorchAoConfig

        config = TorchAoConfig(quant_type=_config(**job.variant.settings))
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto", quantization_config=config)
        model.save_pretrained(job.output)
        copy_tokenizer(job.model, job.output)
        notes = ["embedding, head and norms stay in 16 bit", "timed through torch.compile, as torchao asks for"]
        if "weight_dtype" in job.variant.settings:
            notes.append("a code of fewer bits takes a whole byte: torchao packs them for Arm and GPUs only")
        return notes

    def load(self, folder: Path, threads: int) -> LoadedModel:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        loaded = TransformersModel(model, compiled=torch.compile(model.forward, dynamic=True))
        session = loaded.start()  # compiling takes minutes, which no prompt should pay for
        for piece in WARM_UP:
            session.feed(piece)
        return loaded


def _config(config: str, weight_dtype: str = "", group_size: int = 0) -> Any:
    """The tool's configuration object."""
    import torch
    from torchao import quantization

    made = getattr(quantization, config)
    if not weight_dtype:
        return made()
    return made(weight_dtype=getattr(torch, weight_dtype), granularity=quantization.PerGroup(group_size))
