"""OpenVINO with NNCF's weight compression (https://github.com/openvinotoolkit/nncf), exported by optimum-intel."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quern.core.engine import LoadedModel
from quern.peers.base import PEERS, Peer, ToolJob, Variant

FILE = "openvino_model.xml"
DEPLOYED = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*")
"""What the artifact needs beside the model, by pattern."""


def _data_free(name: str, bits: float, mode: str, group_size: int, *, default: bool = False) -> Variant:
    return Variant(name=name, bits=bits, settings={"mode": mode, "group_size": group_size}, default=default)


def _data_aware(name: str, bits: float, mode: str, *, default: bool = False) -> Variant:
    settings = {"mode": mode, "group_size": 64, "awq": True, "scale_estimation": True}
    return Variant(name=name, bits=bits, settings=settings, calibrated=True, default=default)


@PEERS.add("openvino")
class OpenVino(Peer):
    """Linears in the asked precision; the embedding and the head in NNCF's backup precision, asymmetric int8."""

    tool = "OpenVINO + NNCF"
    package = "openvino"
    also = ("nncf", "optimum-intel")
    modules = ("openvino", "nncf", "optimum.intel")
    versions = ">=2026.0,<2027"
    requirements = ("openvino==2026.4.1", "nncf==3.4.0", "optimum-intel==2.1.0")
    licence = "Apache-2.0"
    homepage = "https://github.com/openvinotoolkit/nncf"
    runtime = "OpenVINO CPU plugin"
    targets = ("openvino",)
    variants = (
        _data_free("int8", 8, "int8_asym", -1, default=True),
        _data_aware("int4-asym-g64-awq-se", 4, "int4_asym", default=True),
        _data_free("int4-asym-g64", 4, "int4_asym", 64),
        _data_free("int4-sym-g64", 4, "int4_sym", 64, default=True),
        _data_aware("int4-sym-g64-awq-se", 4, "int4_sym"),
        _data_aware("int3-sym-g64-awq-se", 3, "int3_sym"),
        _data_aware("int2-sym-g64-awq-se", 2, "int2_sym"),
    )

    def quantize(self, job: ToolJob) -> Sequence[str]:
        import nncf
        import openvino
        from optimum.intel import OVModelForCausalLM

        settings = dict(job.variant.settings)
        mode, group_size = nncf.CompressWeightsMode(settings.pop("mode")), settings.pop("group_size")
        exported = OVModelForCausalLM.from_pretrained(
            str(job.model), export=True, load_in_8bit=False, compile=False, use_cache=True, stateful=True
        )
        if group_size > 0:  # the 8-bit modes have one scale for a row and take no other arguments
            settings |= {"group_size": group_size, "ratio": 1.0}
        if job.variant.calibrated:
            settings |= {"dataset": nncf.Dataset(_inputs(job.sequences)), "subset_size": len(job.sequences)}
        compressed = nncf.compress_weights(exported.model, mode=mode, **settings)
        openvino.save_model(compressed, job.output / FILE)
        for pattern in DEPLOYED:
            for file in job.model.glob(pattern):
                shutil.copy(file, job.output)
        return [f"weights stored as {_count(compressed)}", _runtime(job.output / FILE, job.threads)]

    def load(self, folder: Path, threads: int) -> LoadedModel:
        from quern.peers.openvino_model import OpenVinoModel

        config = json.loads((folder / "config.json").read_text("utf-8"))
        return OpenVinoModel(folder / FILE, threads, int(config["max_position_embeddings"]))


def _runtime(file: Path, threads: int) -> str:
    """A note on what the CPU plugin chooses here by default: part of the accuracy that is measured."""
    from quern.peers.openvino_model import OpenVinoModel

    chosen = OpenVinoModel(file, threads, maximum_length=1).choices()
    return "run with the CPU plugin's defaults: " + ", ".join(f"{name}={value}" for name, value in chosen.items())


def _inputs(sequences: NDArray[np.int64]) -> list[dict[str, NDArray[Any]]]:
    """The exported model's inputs for every sequence; NNCF empties the cache between them."""
    time = sequences.shape[1]
    shared: dict[str, NDArray[Any]] = {
        "attention_mask": np.ones((1, time), np.int64),
        "position_ids": np.arange(time)[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    return [{"input_ids": row[None], **shared} for row in sequences]


def _count(model: Any) -> str:
    """How many weights the matrices have in each type."""
    matrices = [op for op in model.get_ops() if op.get_type_name() == "Constant" and len(op.get_output_shape(0)) > 1]
    counted: Counter[str] = Counter()
    for op in matrices:
        counted[op.get_element_type().get_type_name()] += int(np.prod(op.get_output_shape(0)))
    return ", ".join(f"{number} {kind}" for kind, number in counted.most_common())
