"""optimum-quanto: symmetric weights without calibration (https://github.com/huggingface/optimum-quanto)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from quern.core.engine import LoadedModel
from quern.peers.base import PEERS, Peer, ToolJob, Variant
from quern.peers.transformers_model import TransformersModel, copy_tokenizer

WEIGHTS, MAP = "model.safetensors", "quantization_map.json"


@PEERS.add("quanto")
class Quanto(Peer):
    """Linears but the head; saved as the tool's documentation says: state dict and quantization map."""

    tool = "optimum-quanto"
    package = "optimum-quanto"
    modules = ("optimum.quanto",)
    versions = ">=0.2.7,<0.3"
    requirements = ("transformers==5.23.0", "optimum-quanto==0.2.7")
    licence = "Apache-2.0"
    homepage = "https://github.com/huggingface/optimum-quanto"
    runtime = "transformers with quanto's modules"
    targets = ("transformers",)
    devices = ("cpu", "cuda")
    variants = (
        Variant(name="int8", bits=8, settings={"weights": "qint8"}),
        Variant(name="int4", bits=4, settings={"weights": "qint4"}),
        Variant(name="int2", bits=2, settings={"weights": "qint2"}, default=False),
    )

    def quantize(self, job: ToolJob) -> Sequence[str]:
        from optimum import quanto
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
        quanto.quantize(model, weights=getattr(quanto, job.variant.settings["weights"]), exclude="lm_head")
        quanto.freeze(model)
        state = model.state_dict()
        if model.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, job.output / WEIGHTS)
        (job.output / MAP).write_text(json.dumps(quanto.quantization_map(model), indent=2), "utf-8")
        shutil.copy(job.model / "config.json", job.output)
        copy_tokenizer(job.model, job.output)
        return ["embedding, head and norms stay in 16 bit", "weights are unpacked for every product"]

    def load(self, folder: Path, threads: int) -> LoadedModel:
        import torch
        from optimum import quanto
        from safetensors.torch import load_file
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(config, "dtype", None) or torch.float32)
        # Copied out of the mapped file: torch's int8 product reads past the end of its operand.
        state = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        quanto.requantize(model, state, json.loads((folder / MAP).read_text("utf-8")), torch.device("cpu"))
        model.tie_weights()
        return TransformersModel(model, guard=torch.no_grad)  # 4-bit weights do not run in inference mode
