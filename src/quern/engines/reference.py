"""The reference engine: transformers' model classes on torch, packed weights unpacked as they are used.

Slow and plain: it judges every other engine. It runs unquantized folders and GGUF files, what other tools quantized
as decoded values, quern's artifacts and, where the compressed-tensors package is installed, compressed-tensors
artifacts (the only ones that transformers itself reads).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quern.architectures.base import architecture_of
from quern.checkpoint.checkpoint import Checkpoint
from quern.codecs.base import CODECS
from quern.core.artifact import quantization_of
from quern.core.engine import cache_argument, switch_length
from quern.core.errors import UserError
from quern.core.machine.parallel import thread_count
from quern.engines._build import build, stored_dtype
from quern.engines._modules import PackedWeight, QuantizedEmbedding
from quern.engines._session import SequenceSession, check_batch
from quern.engines.base import ENGINES, DtypeName, Engine
from quern.formats.base import FORMATS, StoredModule, format_of, reader_of
from quern.loading.fitting import model_config, open_model, read_methods

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
"""In names of what belongs to one of several experts."""


class ReferenceSequence:
    """One text with transformers' key/value cache.

    After each token the logits are those of the whole text in one pass. Where what is cached does not serve any more (a
    text that grew too long for its rotary frequencies, arithmetic that turned wider) all of it is computed again.
    """

    def __init__(self, model: ReferenceModel) -> None:
        self._model = model
        self._ids: list[int] = []
        self._cache, self._long = _empty_cache(), False
        self._open = True

    @property
    def length(self) -> int:
        """Tokens fed so far."""
        return len(self._ids)

    def fork(self, length: int) -> ReferenceSequence:
        """Another one, which shares nothing."""
        assert 0 <= length <= len(self._ids)
        return ReferenceSequence(self._model)

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        assert 0 <= length <= len(self._ids)
        cached = self._cache.get_seq_length()
        if length < cached:
            self._cache.crop(length - cached)
        del self._ids[length:]

    def close(self) -> None:
        """Let the cache go."""
        self._ids, self._cache, self._open = [], None, False

    def check(self, tokens: int) -> None:
        """Raise ``UserError`` where it is closed, or ``tokens`` more do not fit."""
        if not self._open:
            raise UserError("the sequence is closed; open another one")
        length, limit = len(self._ids) + tokens, self._model.maximum_length
        if length > limit:
            raise UserError(f"{length} tokens do not fit: this model's context is {limit}. Shorten the prompt")

    def append(self, ids: list[int], rows: int = 1, *, hidden: bool = False) -> Tensor:
        """Float32 logits ``(rows, vocabulary)`` after the last ``rows`` of ``ids``, or the head's inputs ``(rows, width)``.

        ``check`` let them through.
        """
        forward = self._model.states if hidden else self._model.forward
        whole = [*self._ids, *ids]
        if (long := self._model.counts_as_long(len(whole))) != self._long:
            self._cache, self._long = _empty_cache(), long
        found = forward([whole[self._cache.get_seq_length() :]], self._cache, rows)
        if self._model.overflowed(found):
            self._model.widen()
            self._cache = _empty_cache()
            found = forward([whole], self._cache, rows)
        self._ids = whole
        return found[0]


def _empty_cache() -> Any:
    """A cache that keeps all positions of all layers, so that it can be cut back; masks see to sliding windows."""
    from transformers import DynamicCache

    return DynamicCache()


class ReferenceModel:
    """A loaded folder; see ``core.engine.BatchModel``, ``SwitchingModel`` and ``NotingModel``."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.vocabulary_size = int(model.config.vocab_size)
        self.maximum_length = int(model.config.max_position_embeddings)
        self.hidden_size = int(model.config.hidden_size)
        self.switch_length = switch_length(model.config)
        self.notes: list[str] = []
        self._cache_argument = cache_argument(model)

    def counts_as_long(self, length: int) -> bool:
        """Whether a text of ``length`` tokens goes by the rotary frequencies of long texts."""
        return self.switch_length is not None and length > self.switch_length

    def forward(self, ids: list[list[int]], cache: Any, rows: int) -> Tensor:
        """Logits float32 ``(batch, rows, vocabulary)`` of the last positions of ``ids``, which are added to ``cache``."""
        options = {self._cache_argument: cache, "use_cache": True, "logits_to_keep": rows, "return_dict": True}
        with torch.inference_mode():
            logits: Tensor = self.model(torch.tensor(ids), **options).logits.float()
        return logits

    def states(self, ids: list[list[int]], cache: Any, rows: int) -> Tensor:
        """What the head reads, float32 ``(batch, rows, width)``, where ``forward`` gives logits."""
        options = {self._cache_argument: cache, "use_cache": True, "return_dict": True}
        with torch.inference_mode():
            states: Tensor = self.model.base_model(torch.tensor(ids), **options).last_hidden_state.float()
        return states[:, -rows:]

    def logits(self, ids: Tensor) -> Tensor:
        """Logits float32 ``(batch, time, vocabulary)`` for int64 ``(batch, time)``."""
        logits = self._logits(ids)
        if self.overflowed(logits):
            self.widen()
            logits = self._logits(ids)
        return logits

    def _logits(self, ids: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.model(ids, use_cache=False).logits.float()
        return logits

    def overflowed(self, logits: Tensor) -> bool:
        """Whether ``logits`` are no numbers because float16, whose greatest is 65504, was too narrow for the model."""
        return self.model.dtype == torch.float16 and not bool(logits.isfinite().all())

    def widen(self) -> None:
        """Go on in float32."""
        self.model.float()
        for module in self.model.modules():
            if isinstance(module, QuantizedEmbedding):
                module.dtype = torch.float32
        self.notes.append("float16 arithmetic overflowed (its greatest number is 65504), so the model ran in float32")

    def open(self) -> ReferenceSequence:
        """A sequence without tokens. Its memory is taken as it grows."""
        return ReferenceSequence(self)

    def step(
        self, batch: Sequence[tuple[ReferenceSequence, list[int]]], drafted: Sequence[int] | None = None
    ) -> Tensor:
        """Append tokens to several sequences, one after the other; see ``core.engine.BatchModel``."""
        counts = check_batch(batch, drafted)
        for sequence, tokens in batch:
            sequence.check(len(tokens))
        steps = zip(batch, counts, strict=True)
        return torch.cat([sequence.append(tokens, 1 + count) for (sequence, tokens), count in steps])

    def hidden_states(self, batch: Sequence[tuple[ReferenceSequence, list[int]]]) -> Tensor:
        """Append tokens to several sequences; see ``core.engine.BatchModel``."""
        check_batch(batch)
        for sequence, tokens in batch:
            sequence.check(len(tokens))
        return torch.cat([sequence.append(tokens, len(tokens), hidden=True) for sequence, tokens in batch])

    def start(self) -> SequenceSession:
        """An empty session."""
        return SequenceSession(self)

    def bytes_per_token(self) -> int:
        """Bytes of weights that one decoded token reads: everything but an untied embedding, of which it reads a row."""
        embedding = self.model.get_input_embeddings()
        read = {name: parameter.nbytes for name, parameter in self.model.named_parameters()}
        modules = self.model.named_modules()
        read |= {name: module.stored_bytes() for name, module in modules if isinstance(module, PackedWeight)}
        total = sum(read.values()) - self._not_met(read)
        if self.model.config.tie_word_embeddings:
            return int(total)
        whole = embedding.stored_bytes() if isinstance(embedding, QuantizedEmbedding) else embedding.weight.nbytes
        return int(total - whole + whole // self.vocabulary_size)

    def _not_met(self, read: dict[str, int]) -> int:
        """Of the bytes that are ``read``, by name, those of experts that a token does not meet."""
        experts = {name: match[1] for name in read if (match := _EXPERT.search(name))}
        if not experts:
            return 0
        total, count = sum(read[name] for name in experts), len(set(experts.values()))
        return total - total * int(self.model.config.num_experts_per_tok) // count


@ENGINES.add("reference")
class ReferenceEngine(Engine):
    """Runs whatever the registered codecs can decode."""

    def obstacle(self, format: str | None, modules: Collection[StoredModule]) -> str | None:
        unknown = {module.scheme.codec for module in modules} - set(CODECS.names())
        return f"no codec called {', '.join(sorted(unknown))} is installed" if unknown else None

    def runs(self, checkpoint: Checkpoint) -> str | None:
        method = (quantization_of(checkpoint.config) or {}).get("quant_method")
        found = format_of(method)
        own = found is not None and not found.reader.through_transformers
        return super().runs(checkpoint) if own else None  # load() says what is missing

    def load(self, path: str | Path, *, dtype: DtypeName = "auto", threads: int | None = None) -> ReferenceModel:
        checkpoint = open_model(path)
        quantization = quantization_of(checkpoint.config)
        method = None if quantization is None else quantization.get("quant_method")
        if quantization is not None and format_of(method) is None:
            formats = [FORMATS.get(name) for name in reversed(FORMATS.names())]
            *others, last = (one.method for one in formats if one.opened and not one.opened_as_values)
            known = f"{', '.join(others)} and {last}"
            raise UserError(
                f"{path} is quantized by {method!r}; this engine runs {known} artifacts, and what these wrote as the values "
                f"that it stands for: {read_methods()}"
            )
        reader = reader_of(quantization, architecture_of(model_config(checkpoint)))
        if threads is not None:
            torch.set_num_threads(thread_count(threads))
        if reader is not None and reader.through_transformers:
            return ReferenceModel(reader.load_model(checkpoint, "auto" if dtype == "auto" else _dtype(dtype)))
        return ReferenceModel(build(checkpoint, stored_dtype(checkpoint) if dtype == "auto" else _dtype(dtype)))


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def load(path: str | Path, *, dtype: DtypeName = "auto", threads: int | None = None) -> ReferenceModel:
    """Load a folder with the reference engine. Raises ``UserError`` for one that it cannot run."""
    return ReferenceEngine().load(path, dtype=dtype, threads=threads)
