"""Measuring a model that behaves like one of transformers' causal models, whatever its linears are made of."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quern.core.engine import cache_argument, switch_length
from quern.core.errors import UserError

if TYPE_CHECKING:
    import torch


class TransformersSession:
    """One sequence with transformers' key/value cache; see ``core.engine.Session``."""

    def __init__(self, model: Any, argument: str, maximum_length: int, guard: Any) -> None:
        self._model = model
        self._argument = argument
        self._guard = guard
        self._maximum_length = maximum_length
        self._cache: Any = None
        self._length = 0

    @property
    def length(self) -> int:
        """Tokens fed so far."""
        return self._length

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        if length == 0:
            self._cache = None
        elif length < self._length:
            self._cache.crop(length - self._length)
        self._length = length

    def feed(self, ids: list[int]) -> torch.Tensor:
        """Append ``ids``; float32 logits ``(vocabulary,)`` of the last position."""
        import torch

        self._length += len(ids)
        if self._length > self._maximum_length:
            raise UserError(f"{self._length} tokens do not fit: this model's context is {self._maximum_length}")
        with self._guard():
            cache = {self._argument: self._cache}
            output = self._model(input_ids=torch.tensor([ids]), **cache, use_cache=True, logits_to_keep=1)
        self._cache = output[self._argument]
        logits: torch.Tensor = output.logits[0, -1].float()
        return logits


class TransformersModel:
    """A causal model of transformers with another tool's linears in it; see ``core.engine.LoadedModel``.

    ``weight_bytes`` is what the weights of the whole model take in memory as the tool runs them; None: the bytes of its
    parameters and buffers. ``compiled``, if given, is the model as sessions call it. ``guard`` keeps torch from recording
    gradients (default: ``torch.inference_mode``). The rows of an embedding that is not tied are not read for a token, so
    they do not count.
    """

    def __init__(self, model: Any, weight_bytes: int | None = None, compiled: Any = None, guard: Any = None) -> None:
        import torch

        self.model = model.eval()
        self._guard = torch.inference_mode if guard is None else guard
        self._runner = model if compiled is None else compiled
        self.vocabulary_size = int(model.config.vocab_size)
        self.maximum_length = int(model.config.max_position_embeddings)
        self.switch_length = switch_length(model.config)
        self._weight_bytes = weight_bytes

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits float32 ``(batch, time, vocabulary)`` for int64 ``(batch, time)``."""
        with self._guard():
            output = self.model(input_ids=ids, use_cache=False)
        logits: torch.Tensor = output.logits[..., : self.vocabulary_size].float()
        return logits

    def start(self) -> TransformersSession:
        """An empty session."""
        return TransformersSession(self._runner, cache_argument(self.model), self.maximum_length, self._guard)

    def bytes_per_token(self) -> int:
        """Bytes of weights that one decoded token reads."""
        if self._weight_bytes is not None:
            return self._weight_bytes
        total = _stored_bytes([*self.model.parameters(), *self.model.buffers()])
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if head is not None and getattr(head, "weight", None) is not embedding.weight:
            total -= _stored_bytes([embedding.weight])
        return total


def _stored_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of tensors, one that several names share counted once; wrapped ones by what they hold."""
    seen: dict[int, int] = {}
    for tensor in tensors:
        parts = [tensor]
        if hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            parts = [getattr(tensor, name) for name in names]
        for part in parts:
            if hasattr(part, "__tensor_flatten__"):
                seen[id(part)] = _stored_bytes([part])
            else:
                seen[part.data_ptr()] = part.numel() * part.element_size()
    return sum(seen.values())


_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "generation_config.json",
)


def copy_tokenizer(model: Path, artifact: Path) -> None:
    """Copy the tokenizer's files, so that a tool's artifact which lacks them can be deployed as it lies there."""
    for pattern in _TOKENIZER_FILES:
        for source in model.glob(pattern):
            if source.is_file() and not (artifact / source.name).exists():
                shutil.copyfile(source, artifact / source.name)


def dense_matrices(artifact: Path) -> str:
    """A note that names the matrices which a safetensors artifact holds unpacked, in floating point."""
    from safetensors import safe_open

    found: Counter[str] = Counter()
    for file in sorted(artifact.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
                stored = tensors.get_slice(name)
                if name.endswith(".weight") and len(stored.get_shape()) == 2 and stored.get_dtype() in _FLOATS:
                    found[_LAYER.sub(".*.", name.removesuffix(".weight"))] += 1
    named = [name if count == 1 else f"{count} x {name}" for name, count in sorted(found.items())]
    return f"not quantized: {', '.join(named) or 'nothing'}"


_FLOATS = ("F64", "F32", "F16", "BF16")
_LAYER = re.compile(r"\.\d+\.")
