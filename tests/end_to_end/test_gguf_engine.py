"""The cpu engine on GGUF files: blocks stay packed, and it computes with them what it computes with the same artifact."""

from __future__ import annotations

import functools
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from artifacts import small_recipe
from gguf_model import write_gguf
from tiny_model import tiny_config, write_model

from quern import _native
from quern.checkpoint.checkpoint import open_checkpoint
from quern.codecs.blocks.points import TYPES as POINTS
from quern.codecs.blocks.points import table_of
from quern.codecs.blocks.types import TYPES
from quern.core.scheme import parse_scheme
from quern.engines._cpu_weights import MappedWeights, unsupported
from quern.engines.base import ENGINES, engine_for
from quern.pipeline.export import export
from quern.pipeline.quantize import quantize

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64, "initializer_range": 0.05}
SMALL = {"intermediate_size": 256, "num_hidden_layers": 1}
"""For the types of points, whose quantizing takes long."""
PACKED = [name for name in TYPES if unsupported(parse_scheme({"codec": "ggml", "type": name})) is None]
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By family and type: an artifact with all matrices of that type, and the same as a GGUF. Llama's files have the rows of q
    and k in another order, Qwen2's have not; one head is the embedding."""
    folder = tmp_path_factory.mktemp("models")
    models = {
        "llama": write_model(
            folder / "llama", tiny_config("llama", tie_word_embeddings=False, torch_dtype="float32", **WIDE)
        ),
        "qwen2": write_model(folder / "qwen2", tiny_config("qwen2", torch_dtype="float32", **WIDE)),
        "small": write_model(
            folder / "small", tiny_config("llama", tie_word_embeddings=False, torch_dtype="float32", **WIDE | SMALL)
        ),
    }

    @functools.cache
    def of(family: str, kind: str) -> tuple[Path, Path]:
        scheme = {"codec": "ggml", "type": kind}
        artifact, file = folder / f"{family}-{kind}", folder / f"{family}-{kind}.gguf"
        points = family == "llama" and kind.upper() in POINTS
        table = {"codec": "ggml", "type": "q8_0"} if points else scheme
        recipe = small_recipe(weights=scheme, embedding=table, head=table)
        quantize(models["small" if points else family], artifact, recipe=recipe, threads=1)
        export(artifact, file)
        return artifact, file

    return of


def load(path: Path):
    return ENGINES.get("cpu")().load(path, threads=2)


def divergence(first: torch.Tensor, second: torch.Tensor) -> float:
    ours, theirs = first.double().log_softmax(-1), second.double().log_softmax(-1)
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


def test_all_types_have_kernels():
    assert set(TYPES) == set(PACKED)


@pytest.mark.parametrize(
    ("family", "kind"), [*(("llama", kind) for kind in PACKED), ("qwen2", "q4_k"), ("qwen2", "q8_0")]
)
def test_a_file_is_the_artifact_that_it_was_made_from(family, kind, made):
    """Bit for bit; and both are what the reference engine decodes, but for int8 inputs."""
    artifact, file = made(family, kind)
    assert engine_for(open_checkpoint(file)) == "cpu"
    packed = load(file)
    logits = packed.logits(IDS)
    assert torch.equal(logits, load(artifact).logits(IDS))
    assert packed.notes == []
    decoded = ENGINES.get("reference")().load(file, dtype="float32").logits(IDS)
    assert 0 < divergence(decoded, logits) < 2e-4
    session = packed.start()
    for token in IDS[0, :5].tolist():
        last = session.feed([token])
    assert torch.equal(last, packed.logits(IDS[:1, :5])[0, -1])


@pytest.mark.parametrize("kind", PACKED)
def test_matrices_hold_what_is_decoded(kind, made):
    """Each column alone, against gguf's own decoder; rows of q in transformers' order."""
    checkpoint = open_checkpoint(made("llama", kind)[1])
    weights = MappedWeights(checkpoint, {})
    matrix = weights.matrix(QUERY, (256, 256))
    found = _native.multiply(matrix, np.eye(256, dtype=np.float32), 1).T
    values = checkpoint.read(f"{QUERY}.weight").numpy()
    # The input 1 is 127 times the float32 number next to 1 / 127; three more roundings follow.
    np.testing.assert_allclose(found, values, rtol=0, atol=8 * 2.0**-24 * np.abs(values).max())
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType["Q8_0" if kind == "q5_0" else kind.upper()]]
    table = table_of(kind.upper()).nbytes if kind.upper() in POINTS else 16 if kind == "iq4_nl" else 0
    assert matrix.bytes == 256 * 256 // weights * size + table


def test_a_type_without_a_kernel_is_dequantized_with_a_note(tmp_path):
    folder = write_model(tmp_path / "model", tiny_config("qwen2", torch_dtype="float32", **WIDE))
    (file,) = write_gguf(folder, tmp_path / "model.gguf", kind=gguf.GGMLQuantizationType.TQ2_0)
    model = load(file)
    assert model.notes == [
        "the cpu engine has no kernel for TQ2_0: 15 matrices were dequantized to float32, which takes more memory and time"
    ]
    decoded = ENGINES.get("reference")().load(file, dtype="float32").logits(IDS)
    assert divergence(decoded, model.logits(IDS)) < 1e-6
