"""The CPU engine: a whole decoder in C++ that reads the artifact's own bytes, memory-mapped.

Weights stay packed; activations become int8, with one scale for each token and group of inputs, in front of every packed
product. Python is called once a token. The reference engine judges it (tests/end_to_end/test_cpu_engine.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from quern import _native
from quern.architectures._decoder import GatedDecoder
from quern.architectures.base import Architecture, architecture_of
from quern.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quern.core.artifact import METHOD, module_schemes, quantization_of
from quern.core.errors import QuernError, UserError
from quern.core.figures import bytes_text
from quern.core.memory import free_memory
from quern.core.parallel import available_threads
from quern.core.recipe import Recipe, parse_recipe
from quern.engines._cpu_weights import MappedWeights, unsupported
from quern.engines.base import ENGINES, DtypeName, Engine

CachePrecision = Literal["float32", "float16", "int8"]
STATIC_ROTARY = ("default", "linear", "yarn", "llama3")
"""Scaling variants whose frequencies do not change with the length of the text."""
PROMPT_ROWS = 256
"""Tokens whose logits are computed at a time."""
SPARE = 0.9
"""Share of the free memory that a key/value cache may plan with."""
BLOCK = _native.CACHE_BLOCK
"""A cache has room for a multiple of so many tokens."""


class CpuSession:
    """One sequence with its key/value cache."""

    def __init__(self, model: CpuModel) -> None:
        self._model = model
        self._cache, self._limit = model.new_cache()

    @property
    def capacity(self) -> int:
        """Tokens that fit: the model's context, or what memory has room for."""
        return min(self._cache.capacity, self._model.maximum_length)

    @property
    def limit(self) -> str:
        """What limits them, as a clause."""
        return self._limit

    @property
    def length(self) -> int:
        """Tokens fed so far."""
        return self._cache.length

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self._cache.length = length

    def feed(self, ids: list[int]) -> Tensor:
        """Append ``ids``; float32 logits ``(vocabulary,)`` of the last position. Raises ``UserError`` past the maximum."""
        length = self._cache.length + len(ids)
        if length > self.capacity:
            raise UserError(f"{length} tokens do not fit: {self._limit}. Shorten the prompt")
        return self._model.feed([self._cache], [ids], all_positions=False)[0]


class CpuModel:
    """A loaded folder; see ``core.engine.LoadedModel``."""

    def __init__(self, decoder: _native.Decoder, config: Any, bytes_per_token: int, cache: CachePrecision) -> None:
        self._decoder, self._bytes_per_token = decoder, bytes_per_token
        self._precision = cache
        self.vocabulary_size = int(config.vocab_size)
        self.maximum_length = int(config.max_position_embeddings)

    def logits(self, ids: Tensor) -> Tensor:
        """Logits float32 ``(batch, time, vocabulary)`` for int64 ``(batch, time)``.

        Raises ``UserError`` for a time past the model's context or the free memory.
        """
        batch, time = ids.shape
        if time > self.maximum_length:
            raise UserError(f"{time} tokens do not fit: {self._context()}. Use shorter sequences")
        logits = torch.empty(batch, time, self.vocabulary_size)
        if time == 0:
            return logits
        cache, _ = self.new_cache(time)
        for row in range(batch):
            cache.length = 0
            for start in range(0, time, PROMPT_ROWS):
                piece = ids[row, start : start + PROMPT_ROWS].tolist()
                logits[row, start : start + len(piece)] = self.feed([cache], [piece], all_positions=True)
        return logits

    def feed(self, caches: list[_native.Cache], ids: list[list[int]], *, all_positions: bool) -> Tensor:
        """Append ``ids[i]`` to ``caches[i]``: logits float32 of each sequence's last position, or of every token fed.

        Raises ``UserError`` for tokens outside the vocabulary, and where memory does not suffice for so many at once.
        """
        tokens = [token for sequence in ids for token in sequence]
        outside = [token for token in tokens if not 0 <= token < self.vocabulary_size]
        if outside:
            raise UserError(
                f"token {outside[0]} is outside the model's vocabulary of {self.vocabulary_size} tokens; "
                "use the tokenizer that belongs to the model"
            )
        counts = [len(sequence) for sequence in ids]
        try:
            logits = self._decoder.feed(caches, counts, np.asarray(tokens, np.int32), all_positions)
        except MemoryError:
            raise UserError(
                f"the system gives no memory to compute {len(tokens)} tokens at once. Shorten the prompt, use fewer "
                "threads, or free memory"
            ) from None
        return torch.from_numpy(logits)

    def start(self) -> CpuSession:
        """An empty session. Raises ``UserError`` where memory has no room for any context."""
        return CpuSession(self)

    def new_cache(self, positions: int | None = None) -> tuple[_native.Cache, str]:
        """A cache for ``positions`` tokens (None: as many as the model's context or memory allow), and what limits it.

        Raises ``UserError`` with what fits where memory has no room for ``positions``, or for any.
        """
        each = self._decoder.bytes_per_position(self._precision)
        wanted = -(-(self.maximum_length if positions is None else positions) // BLOCK) * BLOCK
        fits = int(SPARE * free_memory() / each) // BLOCK * BLOCK
        if fits < (BLOCK if positions is None else wanted):
            raise UserError(
                f"a key/value cache of {wanted} tokens takes {bytes_text(wanted * each)}; the free memory has room for "
                f"{fits} tokens. Ask for a shorter context, use the int8 cache, or free memory"
            )
        limit = self._context() if fits >= wanted else f"the free memory has room for {fits} tokens of context"
        wanted = min(wanted, fits)
        try:
            return self._decoder.cache(wanted, self._precision), limit
        except MemoryError:
            given = self._given(wanted)
        if given == 0 or positions is not None:
            raise UserError(
                f"the system gives no memory for a key/value cache of {wanted} tokens ({bytes_text(wanted * each)}), "
                f"only for one of {given}. Ask for a shorter context or use the int8 cache"
            )
        return self._decoder.cache(given, self._precision), f"the system gives memory for {given} tokens of context"

    def _given(self, refused: int) -> int:
        """Tokens of a cache that the system gives where it refused one, found by halving; a share stays free."""
        size = refused
        while (size := size // 2 // BLOCK * BLOCK) > 0:
            try:
                self._decoder.cache(size, self._precision)
            except MemoryError:
                continue
            return max(BLOCK, int(SPARE * size) // BLOCK * BLOCK)
        return 0

    def _context(self) -> str:
        return f"this model's context is {self.maximum_length}"

    def bytes_per_token(self) -> int:
        """Bytes of weights that one decoded token reads: everything but an untied embedding, of which it reads a row."""
        return self._bytes_per_token


@ENGINES.add("cpu")
class CpuEngine(Engine):
    """Packed weights on CPUs, decoder and all in C++."""

    def supports(self, recipe: Recipe | None) -> str | None:
        if recipe is None:
            return None
        if recipe.format != METHOD:
            return f"it reads artifacts of the format {METHOD}, not {recipe.format}"
        if recipe.activations.mode == "static":
            return "static activations run on the reference engine only"
        for scheme in (recipe.weights, recipe.embedding, recipe.head, *recipe.overrides):
            if (reason := unsupported(scheme)) is not None:
                return reason
        return None

    def runs(self, checkpoint: Checkpoint) -> str | None:
        if checkpoint.path.is_file():
            return "it runs folders, not single files"
        return super().runs(checkpoint) or _unknown(_architecture(checkpoint))

    def load(
        self,
        path: str | Path,
        *,
        dtype: DtypeName = "auto",
        threads: int | None = None,
        cache: CachePrecision = "float16",
    ) -> CpuModel:
        """Load a folder. Hidden states are float32 whatever ``dtype`` says; ``cache`` is how keys and values are kept."""
        checkpoint = open_checkpoint(path)
        if (reason := self.runs(checkpoint)) is not None:
            raise UserError(f"the cpu engine does not run {path}: {reason}. Use the reference engine")
        config = quantization_of(checkpoint.config)
        schemes = {} if config is None else module_schemes(config)
        recipe = None if config is None else parse_recipe(config.get("recipe"), "of the artifact")
        architecture = _architecture(checkpoint)
        assert isinstance(architecture, GatedDecoder)
        rotated = frozenset(name for name in schemes if recipe is not None and recipe.rotated and ".layers." in name)
        weights = MappedWeights(checkpoint, schemes, frozenset(architecture.expected_shapes()), rotated)
        # Whether the blocks were made for int8 activations with one scale a token.
        scale_per_token = recipe is not None and recipe.activations.mode == "dynamic"
        try:
            decoder, bytes_per_token = _decoder(architecture, weights, scale_per_token, threads or available_threads())
        except QuernError:
            raise
        except ValueError as error:
            raise UserError(f"{path} cannot be run: {error}") from None
        return CpuModel(decoder, architecture.config, bytes_per_token, cache)


def _decoder(
    architecture: GatedDecoder, weights: MappedWeights, scale_per_token: bool, threads: int
) -> tuple[_native.Decoder, int]:
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
    by_role = {role: name for name, role in architecture.roles.items()}
    blocks = []
    for index in range(architecture.layers):
        prefix = architecture.block_prefix(index)
        blocks.append(
            _native.Block(
                weights.vector(prefix + "input_layernorm.weight", hidden),
                weights.vector(prefix + "post_attention_layernorm.weight", hidden),
                weights.optional_vector(prefix + "self_attn.q_norm.weight", shape["head_dim"]),
                weights.optional_vector(prefix + "self_attn.k_norm.weight", shape["head_dim"]),
                [
                    weights.linear(prefix + by_role[role], size, scale_per_token=scale_per_token)
                    for role, size in sizes.items()
                ],
            )
        )
    table = (config.vocab_size, hidden)
    embedding = weights.matrix(architecture.embedding, table)
    head_name = architecture.embedding if architecture.tied else architecture.head
    head = weights.linear(head_name, table, scale_per_token=False)
    norm = weights.vector(f"{architecture.final_norm}.weight", hidden)
    bytes_per_token = weights.read_bytes + (0 if architecture.tied else embedding.bytes // config.vocab_size)
    return _native.Decoder(shape, blocks, embedding, norm, head, threads), bytes_per_token


def _architecture(checkpoint: Checkpoint) -> Architecture:
    return architecture_of({key: value for key, value in checkpoint.config.items() if key != "quantization_config"})


def _unknown(architecture: Architecture) -> str | None:
    """What the native decoder does not know of a model; None if it knows all."""
    config = architecture.config
    if not isinstance(architecture, GatedDecoder):
        return f"it does not know the layout of {architecture.model_type}"
    rotary: Any = architecture.build_rotary()
    if rotary.rope_type not in STATIC_ROTARY:
        return f"it knows the rotary scalings {', '.join(STATIC_ROTARY)}; config.json asks for {rotary.rope_type!r}"
    if config.hidden_act != "silu":
        return f"it knows the activation silu; config.json asks for {config.hidden_act!r}"
    if len(set(getattr(config, "layer_types", None) or ["full_attention"])) > 1:
        return "it does not mix sliding and full attention in one model"
    return None


def _shape(architecture: GatedDecoder) -> dict[str, Any]:
    config = architecture.config
    rotary: Any = architecture.build_rotary()
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = (getattr(config, "sliding_window", None) or 0) if layer_types[0] == "sliding_attention" else 0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "layers": architecture.layers,
        "heads": config.num_attention_heads,
        "key_value_heads": config.num_key_value_heads,
        "head_dim": head_dim,
        "vocabulary": config.vocab_size,
        "window": int(window),
        "epsilon": float(config.rms_norm_eps),
        "rotary_factor": float(rotary.attention_scaling),
        "frequencies": [float(value) for value in rotary.inv_freq],
    }
