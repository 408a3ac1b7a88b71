"""AutoRound: rounding and ranges learned block by block with signed gradients (https://github.com/intel/auto-round)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quern.core.engine import LoadedModel
from quern.peers.base import PEERS, Peer, ToolJob, Variant
from quern.peers.transformers_model import TransformersModel, dense_matrices

_LIGHT = {"iters": 50, "lr": 0.005, "batch_size": 4}
"""The tool's light recipe with half its batch, which fits the time of two CPU cores."""
_STANDARD = "200 iterations with batches of 8"
"""The tool's own defaults."""


def _variant(name: str, scheme: Mapping[str, Any], default: bool = True) -> Variant:
    return Variant(name=name, bits=scheme["bits"], settings={**scheme, **_LIGHT}, calibrated=True, default=default)


@PEERS.add("auto-round")
class AutoRound(Peer):
    """Linears of the decoder blocks; the embedding and the head stay as they are."""

    tool = "AutoRound"
    package = "auto-round"
    also = ("auto-round-lib",)
    modules = ("auto_round",)
    versions = ">=0.16.1,<0.17"
    requirements = ("transformers==5.23.0", "auto-round==0.16.1", "auto-round-lib==0.16.0")
    licence = "Apache-2.0"
    homepage = "https://github.com/intel/auto-round"
    runtime = "transformers with AutoRound's CPU kernels"
    targets = ("transformers", "vllm")
    devices = ("cpu", "cuda")
    variants = (
        _variant("int4-g64", {"bits": 4, "group_size": 64, "sym": True}),
        _variant("int3-g64", {"bits": 3, "group_size": 64, "sym": True}, default=False),
        _variant("int2-g32", {"bits": 2, "group_size": 32, "sym": False}),
    )

    def remarks(self, variant: Variant) -> Sequence[str]:
        """How long it is tuned: a user with more time may get a better artifact from the same tool."""
        settings = variant.settings
        return [
            f"tuned for {settings['iters']} iterations with batches of {settings['batch_size']}, to fit the time of a CPU; "
            f"the tool's standard is {_STANDARD}, which takes longer and may lose less"
        ]

    def quantize(self, job: ToolJob) -> Sequence[str]:
        import torch
        from auto_round import AutoRound as Rounding
        from transformers import AutoTokenizer

        count, time = job.sequences.shape
        rounding = Rounding(
            str(job.model),
            AutoTokenizer.from_pretrained(job.model),
            dataset=[row[None] for row in torch.from_numpy(job.sequences)],
            nsamples=count,
            seqlen=time,
            seed=job.seed,
            device_map="cpu",
            **job.variant.settings,
        )
        # The tool makes a folder of its own choice below the one it is given; the artifact must lie in the latter.
        _, saved = rounding.quantize_and_save("saved", format="auto_round")
        for file in Path(saved[0] if isinstance(saved, list) else saved).iterdir():
            shutil.move(file, job.output / file.name)
        return [dense_matrices(job.output)]

    def load(self, folder: Path, threads: int) -> LoadedModel:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype="auto")
        return TransformersModel(model)
