"""ONNX Runtime: MatMulNBits by the model builder of onnxruntime-genai (https://github.com/microsoft/onnxruntime-genai)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from quern.core.engine import LoadedModel
from quern.peers.base import PEERS, Peer, ToolJob, Variant

FILE = "model.onnx"
_PLAIN = "unquantized Gather"
_TAIL = 800


def _variant(
    name: str, precision: str, block_size: int, options: Mapping[str, str], *, default: bool = False
) -> Variant:
    """Accuracy level 4: activations in 8 bits a block, the kernels that ONNX Runtime recommends on a CPU."""
    settings = {"precision": precision, "block_size": str(block_size), "accuracy_level": "4", **options}
    return Variant(name=name, bits=int(precision.removeprefix("int")), settings=settings, default=default)


_SHARED = {"op_types_to_quantize": "MatMul/Gather", "shared_embeddings": "true"}
"""The embedding packed like the head, and one table for both where they are tied: else the embedding stays in float32."""
_RTN = {"algo_config": "rtn", "is_symmetric": "false", **_SHARED}
"""Asymmetric, which the builder's packing of zero points allows only where a row has an even number of blocks."""
_K_QUANT = {"algo_config": "k_quant", "matmul_mixed_precision": "last_matmul:int8", **_SHARED}
"""Scales searched with llama.cpp's rule for its K types; the head in 8 bits."""
_MIXED = {**_K_QUANT, "matmul_mixed_precision": "last_matmul:int8,mixed_layers:int8"}
"""Those layers in 8 bits too that llama.cpp gives more bits."""


@PEERS.add("onnxruntime")
class OnnxRuntime(Peer):
    """Linears and head in MatMulNBits' blocks, the embedding too in 4-bit models; everything else in float32."""

    tool = "ONNX Runtime"
    package = "onnxruntime"
    also = ("onnxruntime-genai", "onnx", "onnx-ir")
    modules = ("onnxruntime", "onnxruntime_genai", "onnx", "onnx_ir")
    versions = ">=1.31,<2"
    requirements = (
        "transformers==5.23.0",
        "onnxruntime==1.31.1",
        "onnxruntime-genai==0.18.0",
        "onnx==1.23.2",
        "onnx-ir==1.1.0",
    )
    licence = "MIT"
    homepage = "https://github.com/microsoft/onnxruntime"
    runtime = "onnxruntime CPU provider"
    targets = ("onnxruntime",)
    variants = (
        _variant("int8-b32", "int8", 32, _RTN, default=True),
        _variant("int4-kquant-mixed-b32", "int4", 32, _MIXED, default=True),
        _variant("int4-kquant-b32", "int4", 32, _K_QUANT, default=True),
        _variant("int4-rtn-b32", "int4", 32, _RTN),
        _variant("int4-rtn-sym-b64", "int4", 64, {**_RTN, "is_symmetric": "true"}),
    )

    def quantize(self, job: ToolJob) -> Sequence[str]:
        settings = dict(job.variant.settings)
        precision = str(settings.pop("precision"))
        if not json.loads((job.model / "config.json").read_text("utf-8")).get("tie_word_embeddings"):
            settings.pop("shared_embeddings", None)
        where = ["-i", str(job.model), "-o", str(job.output), "-c", str(Path.cwd())]
        options = [f"{name}={value}" for name, value in settings.items()]
        module = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        _run([*module, *where, "-p", precision, "-e", "cpu", "--extra_options", *options])
        counted = _count(job.output / FILE)
        notes = ["matrices are " + ", ".join(f"{number} {kind}" for kind, number in counted.most_common())]
        if counted[_PLAIN]:
            notes.append("the model builder packs an embedding in 4-bit models only; here it stays in float32")
        return notes

    def load(self, folder: Path, threads: int) -> LoadedModel:
        from quern.peers.onnx_model import OnnxModel

        config = json.loads((folder / "genai_config.json").read_text("utf-8"))["model"]
        head_size, length = int(config["decoder"]["head_size"]), int(config["context_length"])
        return OnnxModel(folder / FILE, threads, head_size=head_size, maximum_length=length)


def _run(command: Sequence[str]) -> None:
    """Raises ``RuntimeError`` with the end of what ``command`` said if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    sys.stderr.write(done.stdout + done.stderr)
    if done.returncode:
        said = (done.stdout + done.stderr)[-_TAIL:].strip()
        raise RuntimeError(f"the model builder ended with {done.returncode}: {said}")


def _count(file: Path) -> Counter[str]:
    """How many matrices the graph has, by operator and bits."""
    import onnx

    graph = onnx.load(str(file), load_external_data=False).graph
    stored = {tensor.name for tensor in graph.initializer}
    counted: Counter[str] = Counter()
    for node in graph.node:
        bits = next((attribute.i for attribute in node.attribute if attribute.name == "bits"), None)
        if bits is not None:
            counted[f"{node.op_type} {bits} bit"] += 1
        elif node.op_type in ("MatMul", "Gather") and stored & set(node.input):
            counted[f"unquantized {node.op_type}"] += 1
    return counted
