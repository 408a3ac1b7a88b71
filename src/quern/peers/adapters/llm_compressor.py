"""llm-compressor: quantizes for vLLM, saves compressed-tensors (https://github.com/vllm-project/llm-compressor)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quern.core.engine import LoadedModel
from quern.peers.base import PEERS, Peer, ToolJob, Variant
from quern.peers.transformers_model import TransformersModel, copy_tokenizer, dense_matrices


def _groups(bits: int, group_size: int) -> dict[str, Any]:
    """Arguments of a modifier that quantizes weights alone: the scheme W4A16 has groups of 128 and no other size."""
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    return {"ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


@PEERS.add("llm-compressor")
class LlmCompressor(Peer):
    """All linears but the head; the embedding and the head stay as they are."""

    tool = "llm-compressor"
    package = "llmcompressor"
    also = ("compressed-tensors",)
    modules = ("llmcompressor", "compressed_tensors")
    versions = ">=0.14.0,<0.15"
    requirements = ("llmcompressor==0.14.0.1",)
    licence = "Apache-2.0"
    homepage = "https://github.com/vllm-project/llm-compressor"
    runtime = "transformers with compressed-tensors"
    targets = ("vllm", "transformers")
    devices = ("cpu", "cuda")
    variants = (
        Variant(name="w4a16-g64", bits=4, settings={"GPTQModifier": _groups(4, 64)}, calibrated=True),
        Variant(
            name="w8a8",
            bits=8,
            settings={
                "SmoothQuantModifier": {"smoothing_strength": 0.8},
                "GPTQModifier": {"targets": "Linear", "scheme": "W8A8", "ignore": ["lm_head"]},
            },
            calibrated=True,
        ),
    )

    def quantize(self, job: ToolJob) -> Sequence[str]:
        from datasets import Dataset
        from llmcompressor import oneshot
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
        rows = job.sequences.tolist()
        oneshot(
            model=model,
            dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
            recipe=_recipe(job.variant.settings),
            max_seq_length=job.sequences.shape[1],
            num_calibration_samples=len(rows),
            shuffle_calibration_samples=False,
        )
        model.save_pretrained(job.output, save_compressed=True)
        copy_tokenizer(job.model, job.output)
        notes = [
            dense_matrices(job.output),
            "weights are unpacked to 16 bit at the first use here; vLLM runs them packed",
        ]
        if "SmoothQuantModifier" in job.variant.settings:
            notes.append("8-bit activations are simulated here: rounded, then multiplied in 16 bit")
        return notes

    def load(self, folder: Path, threads: int) -> LoadedModel:
        import torch
        from transformers import AutoModelForCausalLM

        loaded = TransformersModel(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))
        loaded.logits(torch.zeros(1, 1, dtype=torch.int64))  # unpacks all weights, which no timed prompt must pay for
        return loaded


def _recipe(settings: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """The tool's modifiers by their names, in the order in which they are applied."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    known = {"GPTQModifier": GPTQModifier, "SmoothQuantModifier": SmoothQuantModifier}
    return [known[name](**arguments) for name, arguments in settings.items()]
