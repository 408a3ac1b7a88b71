"""HQQ: half-quadratic quantization, without calibration (https://github.com/mobiusml/hqq)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quern.core.engine import LoadedModel
from quern.peers.base import PEERS, Peer, ToolJob, Variant
from quern.peers.transformers_model import TransformersModel, copy_tokenizer


@PEERS.add("hqq")
class Hqq(Peer):
    """Linears only; the embedding and the head stay as they are."""

    tool = "HQQ"
    package = "hqq"
    modules = ("hqq.core.quantize", "hqq.models.hf.base")
    versions = ">=0.2.8,<0.3"
    requirements = ("transformers==5.23.0", "hqq==0.2.8")
    sources = ("hqq",)
    licence = "Apache-2.0"
    homepage = "https://github.com/mobiusml/hqq"
    runtime = "transformers with HQQ's torch path"
    targets = ("transformers",)
    devices = ("cpu", "cuda")
    environment = {"DISABLE_CUDA": "1"}  # its set-up compiles kernels that are not used here
    variants = (
        Variant(name="int4-g64", bits=4, settings={"nbits": 4, "group_size": 64, "axis": 1}),
        Variant(name="int3-g64", bits=3, settings={"nbits": 3, "group_size": 64, "axis": 1}),
        Variant(name="int2-g64", bits=2, settings={"nbits": 2, "group_size": 64, "axis": 1}, default=False),
        Variant(name="int8-g64", bits=8, settings={"nbits": 8, "group_size": 64, "axis": 1}, default=False),
    )

    def quantize(self, job: ToolJob) -> Sequence[str]:
        import torch
        from hqq.core.quantize import BaseQuantizeConfig
        from hqq.models.hf.base import AutoHQQHFModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float16)
        config = BaseQuantizeConfig(**job.variant.settings)
        AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float16, device="cpu")
        AutoHQQHFModel.save_quantized(model, str(job.output))
        copy_tokenizer(job.model, job.output)
        return ["embedding, head and norms stay in 16 bit", "every product unpacks its weights to float32 first"]

    def load(self, folder: Path, threads: int) -> LoadedModel:
        import torch
        from hqq.core.quantize import HQQBackend, HQQLinear
        from hqq.models.hf.base import AutoHQQHFModel

        # Compiled, float32 decodes twice as fast as bfloat16 on a CPU, and HQQ would round the rotary embedding's
        # frequencies to the type too.
        model = AutoHQQHFModel.from_quantized(str(folder), compute_dtype=torch.float32, device="cpu")
        if model.config.tie_word_embeddings:
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        loaded = TransformersModel(model, TransformersModel(model).bytes_per_token() + _meta_bytes(model))
        try:
            HQQLinear.set_backend(HQQBackend.PYTORCH_FORWARD_COMPILE)
            torch._dynamo.config.recompile_limit = 64  # one for each shape; beyond it, layers silently run uncompiled
            for length in (1, 2, 3):  # one token, one length, then any length: what measuring asks for is compiled now
                loaded.logits(torch.zeros(1, length, dtype=torch.int64))
        except RuntimeError:  # torch finds no C++ compiler
            HQQLinear.set_backend(HQQBackend.PYTORCH_FORWARD)
        return loaded


def _meta_bytes(model: Any) -> int:
    """Bytes of scales and zero points, which HQQ keeps beside a module's parameters."""
    from hqq.core.quantize import HQQLinear

    metas = [module.meta for module in model.modules() if isinstance(module, HQQLinear)]
    return sum(meta[key].numel() * meta[key].element_size() for meta in metas for key in ("scale", "zero"))
