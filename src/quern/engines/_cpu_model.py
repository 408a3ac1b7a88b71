"""A loaded decoder of the CPU engine, and sequences in its key/value pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quern import _native
from quern.core.engine import switch_length
from quern.core.errors import UserError, option
from quern.engines._cpu_pool import CachePrecision, Pool
from quern.engines._session import SequenceSession, check_batch

ORDINARY: CachePrecision = "float16"
"""How keys and values are kept where nobody says: half the memory, and wider for a text whose values it cannot hold."""
PROMPT_ROWS = 256
"""Tokens whose logits are computed at a time."""


class CpuSequence:
    """One text, with its keys and values in pages of the model's pool.

    After each token the logits are those of the whole text in one pass. Where what is cached does not serve any more (a
    text that grew too long for its rotary frequencies, values that float16 cannot hold) all of it is computed again.
    """

    def __init__(self, model: CpuModel, cache: _native.Sequence | None = None, ids: Sequence[int] = ()) -> None:
        self._model = model
        self._cache: _native.Sequence | None = model.pool.open() if cache is None else cache
        self.ids: list[int] = list(ids)

    @property
    def cache(self) -> _native.Sequence:
        """Keys and values of the first ``cache.length`` tokens. Raises ``UserError`` after ``close``."""
        if self._cache is None:
            raise UserError("the sequence is closed; open another one")
        return self._cache

    @property
    def length(self) -> int:
        """Tokens fed so far."""
        return len(self.ids)

    @property
    def capacity(self) -> int:
        """Tokens that fit at the moment: the model's context, or what its pool has room for."""
        return min(self.cache.room, self._model.maximum_length)

    @property
    def limit(self) -> str:
        """What limits them, as a clause."""
        room, context = self.cache.room, self._model.maximum_length
        return f"this model's context is {context}" if room >= context else self._model.pool.limit(room)

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens; pages that are not needed any more go back to the pool."""
        assert 0 <= length <= len(self.ids)
        del self.ids[length:]
        self.trim()

    def fork(self, length: int) -> CpuSequence:
        """Another one that begins with the first ``length`` tokens, as far as they fill whole pages; both have these."""
        assert 0 <= length <= len(self.ids)
        shared = 0 if self.cache.overflowed else min(length, self.cache.length)
        cache = self.cache.fork(shared)
        return CpuSequence(self._model, cache, self.ids[: cache.length])

    def close(self) -> None:
        """Give all pages back to the pool."""
        self._cache = None

    def trim(self) -> None:
        """Keep keys and values of the tokens of ``ids`` only."""
        self.cache.length = min(len(self.ids), self.cache.length)

    def reserve(self, tokens: int) -> None:
        """Take pages for ``tokens`` more. Raises ``UserError`` with what fits where there are too few."""
        length = len(self.ids) + tokens
        if length > self.capacity or not self._with_rotary(length).reserve(length):
            raise UserError(f"{length} tokens do not fit: {self.limit}. Shorten the prompt")

    def restart(self, *, wide: bool) -> None:
        """Let go what is cached; ``wide``: go on in float32. Raises ``UserError`` where the pool has no room."""
        self._cache = None  # its pages go first
        self._cache = self._model.pool.open(wide=wide)

    def pending(self, tokens: list[int]) -> list[int]:
        """What the decoder must be fed to append ``tokens``."""
        return [*self.ids[self.cache.length :], *tokens]

    def _with_rotary(self, length: int) -> _native.Sequence:
        """The cache, emptied where a text of ``length`` tokens goes by other rotary frequencies."""
        if (rotary := self._model.rotary_of(length)) != self.cache.rotary:
            self.cache.length = 0
            self.cache.rotary = rotary
        return self.cache


class CpuSession(SequenceSession):
    """A sequence that is fed alone; see ``core.engine.LimitedSession``."""

    @property
    def capacity(self) -> int:
        """Tokens that fit: the model's context, or what memory has room for."""
        return int(self.sequence.capacity)

    @property
    def limit(self) -> str:
        """What limits them, as a clause."""
        return str(self.sequence.limit)


class CpuModel:
    """A loaded folder; see ``core.engine``: ``BatchModel``, ``SwitchingModel``, ``NotingModel`` and ``CachingModel``."""

    def __init__(
        self, decoder: _native.Decoder, config: Any, bytes_per_token: int, cache: CachePrecision | None
    ) -> None:
        self._decoder, self._bytes_per_token = decoder, bytes_per_token
        self._chosen = cache
        self.pool = Pool(decoder, cache or ORDINARY)
        self.cache_bytes_per_token = self.pool.bytes_per_token
        self.switch_length = switch_length(config)
        self.notes: list[str] = []
        self.vocabulary_size = int(config.vocab_size)
        self.maximum_length = int(config.max_position_embeddings)
        self.hidden_size = int(config.hidden_size)

    def limit_cache(self, most: int) -> None:
        """See ``core.engine.CachingModel``."""
        self.pool.most = most

    def logits(self, ids: Tensor) -> Tensor:
        """Logits float32 ``(batch, time, vocabulary)`` for int64 ``(batch, time)``.

        Raises ``UserError`` for a time past the model's context or the free memory.
        """
        batch, time = ids.shape
        if time > self.maximum_length:
            raise UserError(
                f"{time} tokens do not fit: this model's context is {self.maximum_length}. Use shorter sequences"
            )
        logits = torch.empty(batch, time, self.vocabulary_size)
        if time == 0:
            return logits
        cache = self.pool.open()
        for row in range(batch):
            if not self._fill(cache, ids[row].tolist(), logits[row]):
                self._note_wider()
                cache.length = 0
                self._fill(self.pool.open(wide=True), ids[row].tolist(), logits[row])
                cache = self.pool.open()
        return logits

    def _fill(self, cache: _native.Sequence, ids: list[int], logits: Tensor) -> bool:
        """Write the logits of one text; whether ``cache`` could hold its keys and values. Raises ``UserError``."""
        cache.length = 0
        cache.rotary = self.rotary_of(len(ids))
        if not cache.reserve(len(ids)):
            raise self.pool.refusal(len(ids), cache)
        for start in range(0, len(ids), PROMPT_ROWS):
            piece = ids[start : start + PROMPT_ROWS]
            logits[start : start + len(piece)] = self._feed([cache], [piece], [len(piece)])
            if cache.overflowed:
                return False
        return True

    def rotary_of(self, length: int) -> int:
        """Which set of rotary frequencies a text of ``length`` tokens goes by."""
        return int(self.switch_length is not None and length > self.switch_length)

    def _note_wider(self) -> None:
        """Say that float16 could not hold a text's keys or values. ``UserError`` where the caller chose the precision."""
        greatest = 8 * 65504 if self.pool.precision == "int4" else 65504  # codes reach -8, with a float16 scale
        what = f"keys or values exceed {greatest}, the greatest number of a {self.pool.precision} key/value cache"
        if self._chosen is not None:
            instead = option("cache='float32'", "--cache float32")
            raise UserError(f"{what}. Give {instead} or int8, or leave it out: then the engine chooses")
        note = f"{what}: they were kept as float32, in twice the memory, after starting again"
        if note not in self.notes:
            self.notes.append(note)

    def open(self) -> CpuSequence:
        """A sequence without tokens. Raises ``UserError`` where memory has no room for any."""
        return CpuSequence(self)

    def step(self, batch: Sequence[tuple[CpuSequence, list[int]]], drafted: Sequence[int] | None = None) -> Tensor:
        """Append tokens to several sequences at once; see ``core.engine.BatchModel``. One pass over the weights serves all.

        Each sequence's logits are those that it would get alone, bit for bit.
        """
        return self._append(batch, [1 + count for count in check_batch(batch, drafted)], hidden=False)

    def hidden_states(self, batch: Sequence[tuple[CpuSequence, list[int]]]) -> Tensor:
        """Append tokens to several sequences: float32 ``(tokens, width)``, see ``core.engine.BatchModel``."""
        check_batch(batch)
        return self._append(batch, [len(tokens) for _, tokens in batch], hidden=True)

    def _append(self, batch: Sequence[tuple[CpuSequence, list[int]]], wanted: list[int], *, hidden: bool) -> Tensor:
        """Logits or hidden states of the last ``wanted[i]`` tokens of each; the logits' tokens but the first are guesses."""
        try:
            for sequence, tokens in batch:
                sequence.reserve(len(tokens))
            pieces = [sequence.pending(tokens) for sequence, tokens in batch]
            found = self._feed([sequence.cache for sequence, _ in batch], pieces, wanted, hidden=hidden)
            for (sequence, tokens), rows in zip(batch, torch.split(found, wanted), strict=True):
                if sequence.cache.overflowed and (hidden or not self._without_guesses(sequence, tokens, rows)):
                    self._again(sequence, tokens, rows, hidden=hidden)
        except BaseException:
            for sequence, _ in batch:  # nothing was appended to any
                sequence.trim()
            raise
        for sequence, tokens in batch:
            sequence.ids += tokens
        return found

    def _without_guesses(self, sequence: CpuSequence, tokens: list[int], rows: Tensor) -> bool:
        """Write the logits in front of the guesses for a sequence that float16 was too narrow for, and NaN behind.

        Returns whether that helped: what overflowed may have been a guess, which is no part of the text.
        """
        if len(rows) == 1:
            return False
        sequence.restart(wide=False)
        read = tokens[: len(tokens) - len(rows) + 1]
        sequence.reserve(len(read))
        rows[:1] = self._feed([sequence.cache], [sequence.pending(read)], [1])
        rows[1:] = torch.nan
        return not sequence.cache.overflowed

    def _again(self, sequence: CpuSequence, tokens: list[int], rows: Tensor, *, hidden: bool) -> None:
        """Write what is wanted of a sequence that float16 was too narrow for."""
        self._note_wider()
        sequence.restart(wide=True)
        sequence.reserve(len(tokens))
        rows[:] = self._feed([sequence.cache], [sequence.pending(tokens)], [len(rows)], hidden=hidden)

    def _feed(
        self, caches: list[_native.Sequence], ids: list[list[int]], wanted: list[int], *, hidden: bool = False
    ) -> Tensor:
        """Append ``ids[i]`` to ``caches[i]``: logits float32 of the last ``wanted[i]`` of each, or what the head reads.

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
            found = self._decoder.read(caches, counts, np.asarray(tokens, np.int32), wanted, hidden)
        except MemoryError:
            raise UserError(
                f"the system gives no memory to compute {len(tokens)} tokens at once. Shorten the prompt, use fewer "
                "threads, or free memory"
            ) from None
        return torch.from_numpy(found)

    def start(self) -> CpuSession:
        """An empty session. Raises ``UserError`` where memory has no room for any context."""
        return CpuSession(self)

    def bytes_per_token(self) -> int:
        """Bytes of weights that one decoded token reads: everything but an untied embedding, of which it reads a row."""
        return self._bytes_per_token

    def program(self) -> tuple[bytes, list[tuple[int, NDArray[np.uint8]]]]:
        """The decoder as the program of a run file, and its arrays with their places there (csrc/program/format.h)."""
        return self._decoder.program(self.maximum_length, self.switch_length or 0)
