"""The CPU engine: a whole decoder in C++ that reads the artifact's own bytes, memory-mapped.

Weights stay packed; activations become int8, with one scale for each token and group of inputs, in front of every packed
product. Python is called once a token. The reference engine judges it (tests/end_to_end/test_cpu_engine.py).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from quern import _native
from quern.architectures._decoder import GatedDecoder
from quern.architectures.base import Architecture, architecture_of
from quern.checkpoint.checkpoint import Checkpoint
from quern.core.artifact import quantization_of
from quern.core.errors import QuernError, UserError
from quern.core.parallel import thread_count
from quern.engines._cpu_model import CachePrecision as CachePrecision
from quern.engines._cpu_model import CpuModel
from quern.engines._cpu_weights import MappedWeights, unsupported
from quern.engines._rotary import frequencies
from quern.engines.base import ENGINES, DtypeName, Engine
from quern.formats.base import StoredModule, reader_of
from quern.formats.quern import METHOD
from quern.loading.fitting import model_config, open_model

ROTARY = ("default", "linear", "yarn", "llama3", "dynamic", "longrope")
"""Scaling variants that are known; ``_rotary`` says how frequencies depend on the text's length."""
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
"""Names in config.json, as transformers means them, and the native function that computes it."""


SEVEN = sorted(("query", "key", "value", "output", "gate", "up", "down"))
"""Roles of the linears of a block that it runs."""


@ENGINES.add("cpu")
class CpuEngine(Engine):
    """Packed weights on CPUs, decoder and all in C++."""

    def obstacle(self, format: str | None, modules: Collection[StoredModule]) -> str | None:
        if format not in (None, METHOD):
            return f"it reads artifacts of the format {METHOD}, not {format}"
        if any(module.activations == "static" for module in modules):
            return "static activations run on the reference engine only"
        return next((reason for module in modules if (reason := unsupported(module.scheme)) is not None), None)

    def runs(self, checkpoint: Checkpoint) -> str | None:
        return super().runs(checkpoint) or _unknown(architecture_of(model_config(checkpoint)))

    def load(
        self,
        path: str | Path,
        *,
        dtype: DtypeName = "auto",
        threads: int | None = None,
        cache: CachePrecision | None = None,
    ) -> CpuModel:
        """Load a model. Hidden states are float32 whatever ``dtype`` says.

        ``cache`` is how keys and values are kept; None: as float16, and as float32 for a text whose values that cannot hold.
        """
        checkpoint = open_model(path)
        if (reason := self.runs(checkpoint)) is not None:
            raise UserError(f"the cpu engine does not run {path}: {reason}. Use the reference engine")
        architecture = architecture_of(model_config(checkpoint))
        assert isinstance(architecture, GatedDecoder)
        reader = reader_of(quantization_of(checkpoint.config), architecture)
        weights = MappedWeights(checkpoint, {} if reader is None else reader.plan())
        try:
            decoder, bytes_per_token = _decoder(architecture, weights, thread_count(threads))
        except QuernError:
            raise
        except ValueError as error:
            raise UserError(f"{path} cannot be run: {error}") from None
        return CpuModel(decoder, architecture.config, bytes_per_token, cache)


def _decoder(architecture: GatedDecoder, weights: MappedWeights, threads: int) -> tuple[_native.Decoder, int]:
    """The native decoder and the bytes of weights that a token reads."""
    config = architecture.config
    shape = _shape(architecture)
    hidden, inner = shape["hidden"], shape["intermediate"]
    query, key = shape["heads"] * shape["head_dim"], shape["key_value_heads"] * shape["head_dim"]
    sizes = {
        "query": (query, hidden),
        "key": (key, hidden),
        "value": (key, hidden),
        "output": (hidden, query),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }
    blocks = []
    for block in architecture.blocks:
        prefix = block.prefix
        by_role = {linear.role: linear.name for linear in block.linears}
        blocks.append(
            _native.Block(
                weights.vector(prefix + "input_layernorm.weight", hidden),
                weights.vector(prefix + "post_attention_layernorm.weight", hidden),
                weights.optional_vector(prefix + "self_attn.q_norm.weight", shape["head_dim"]),
                weights.optional_vector(prefix + "self_attn.k_norm.weight", shape["head_dim"]),
                [weights.linear(prefix + by_role[role], size) for role, size in sizes.items()],
            )
        )
    table = (config.vocab_size, hidden)
    embedding = weights.matrix(architecture.embedding, table)
    head_name = architecture.head_owner
    head = weights.linear(head_name, table)
    norm = weights.vector(f"{architecture.final_norm}.weight", hidden)
    bytes_per_token = weights.read_bytes + (0 if architecture.tied else embedding.bytes // config.vocab_size)
    return _native.Decoder(shape, blocks, embedding, norm, head, threads), bytes_per_token


def _unknown(architecture: Architecture) -> str | None:
    """What the native decoder does not know of a model; None if it knows all."""
    config = architecture.config
    if not isinstance(architecture, GatedDecoder):
        return f"it does not know the layout of {architecture.model_type}"
    if any(sorted(linear.role for linear in block.linears) != SEVEN for block in architecture.blocks):
        return f"it knows blocks of {', '.join(SEVEN)}, one of each, and those of {architecture.model_type} have others"
    rotary: Any = architecture.build_rotary()
    if rotary.rope_type not in ROTARY:
        return f"it knows the rotary scalings {', '.join(ROTARY)}; config.json asks for {rotary.rope_type!r}"
    if config.hidden_act not in ACTIVATIONS:
        return f"it knows the activations {', '.join(ACTIVATIONS)}; config.json asks for {config.hidden_act!r}"
    return None


def _shape(architecture: GatedDecoder) -> dict[str, Any]:
    config = architecture.config
    sets, factor = frequencies(architecture)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "layers": architecture.layers,
        "heads": config.num_attention_heads,
        "key_value_heads": config.num_key_value_heads,
        "head_dim": head_dim,
        "vocabulary": config.vocab_size,
        "windows": [block.window for block in architecture.blocks],
        "activation": ACTIVATIONS[config.hidden_act],
        "epsilon": float(config.rms_norm_eps),
        "rotary_factor": factor,
        "frequencies": sets,
    }
