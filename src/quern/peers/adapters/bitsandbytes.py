"""bitsandbytes: NF4 and LLM.int8() for transformers, without calibration (https://github.com/bitsandbytes-foundation)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quern.core.engine import LoadedModel
from quern.peers.base import PEERS, Peer, ToolJob, Variant
from quern.peers.transformers_model import TransformersModel, copy_tokenizer


@PEERS.add("bitsandbytes")
class BitsAndBytes(Peer):
    """Linears only; the embedding and the head stay as they are."""

    tool = "bitsandbytes"
    package = "bitsandbytes"
    modules = ("bitsandbytes",)
    versions = ">=0.50,<0.51"
    requirements = ("transformers==5.23.0", "bitsandbytes==0.50.2")
    licence = "MIT"
    homepage = "https://github.com/bitsandbytes-foundation/bitsandbytes"
    runtime = "transformers with bitsandbytes' CPU kernels"
    targets = ("transformers", "vllm")
    devices = ("cpu", "cuda")
    variants = (
        Variant(
            name="nf4",
            bits=4,
            settings={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        ),
        Variant(name="fp4", bits=4, settings={"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, default=False),
        Variant(name="int8", bits=8, settings={"load_in_8bit": True}),
    )

    def quantize(self, job: ToolJob) -> Sequence[str]:
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        settings = dict(job.variant.settings)
        if settings.get("load_in_4bit"):
            settings["bnb_4bit_compute_dtype"] = torch.bfloat16
        model = AutoModelForCausalLM.from_pretrained(
            job.model, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**settings), device_map="cpu"
        )
        model.save_pretrained(job.output)
        copy_tokenizer(job.model, job.output)
        return ["embedding, head and norms stay in 16 bit"]

    def load(self, folder: Path, threads: int) -> LoadedModel:
        import torch
        from transformers import AutoModelForCausalLM

        return TransformersModel(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu"))
