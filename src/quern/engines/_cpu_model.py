"""A loaded decoder of the CPU engine, and sequences with their key/value caches."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from quern import _native
from quern.core.engine import switch_length
from quern.core.errors import UserError, option
from quern.core.memory import free_memory
from quern.core.units import bytes_text

CachePrecision = Literal["float32", "float16", "int8"]
ORDINARY: CachePrecision = "float16"
"""How keys and values are kept where nobody says: half the memory, and wider for a text whose values it cannot hold."""
PROMPT_ROWS = 256
"""Tokens whose logits are computed at a time."""
SPARE = 0.9
"""Share of the free memory that a key/value cache may plan with."""
BLOCK = _native.CACHE_BLOCK
"""A cache has room for a multiple of so many tokens."""


class CpuSession:
    """One sequence with its key/value cache.

    After each token the logits are those of the whole text in one pass. Where what is cached does not serve any more (a
    text that grew too long for its rotary frequencies, values that float16 cannot hold) all of it is computed again.
    """

    def __init__(self, model: CpuModel) -> None:
        self._model = model
        self._ids: list[int] = []
        self._precision = model.precision
        self._cache, self._limit = model.new_cache(precision=self._precision)

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
        return len(self._ids)

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        assert 0 <= length <= len(self._ids)
        self._cache.length = min(length, self._cache.length)
        del self._ids[length:]

    def feed(self, ids: list[int]) -> Tensor:
        """Append ``ids``; float32 logits ``(vocabulary,)`` of the last position. Raises ``UserError`` past the maximum."""
        length = len(self._ids) + len(ids)
        self._check_room(length)
        if (rotary := self._model.rotary_of(length)) != self._cache.rotary:
            self._cache.length = 0
            self._cache.rotary = rotary
        given = [*self._ids[self._cache.length :], *ids]
        logits = self._model.feed([self._cache], [given], all_positions=False)
        if self._cache.overflowed:
            self._precision = self._model.wider(self._precision)
            del self._cache  # its memory goes first
            self._cache, self._limit = self._model.new_cache(precision=self._precision)
            self._check_room(length)
            self._cache.rotary = rotary
            logits = self._model.feed([self._cache], [[*self._ids, *ids]], all_positions=False)
        self._ids += ids
        return logits[0]

    def _check_room(self, length: int) -> None:
        if length > self.capacity:
            raise UserError(f"{length} tokens do not fit: {self._limit}. Shorten the prompt")


class CpuModel:
    """A loaded folder; see ``core.engine.LoadedModel``, ``SwitchingModel`` and ``NotingModel``."""

    def __init__(
        self, decoder: _native.Decoder, config: Any, bytes_per_token: int, cache: CachePrecision | None
    ) -> None:
        self._decoder, self._bytes_per_token = decoder, bytes_per_token
        self._chosen = cache
        self.precision: CachePrecision = cache or ORDINARY
        self.switch_length = switch_length(config)
        self.notes: list[str] = []
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
        wide: _native.Cache | None = None
        for row in range(batch):
            if self._fill(cache, ids[row].tolist(), logits[row]):
                continue
            if wide is None:
                wide, _ = self.new_cache(time, self.wider(self.precision))
            self._fill(wide, ids[row].tolist(), logits[row])
            cache, _ = self.new_cache(time)
        return logits

    def _fill(self, cache: _native.Cache, ids: list[int], logits: Tensor) -> bool:
        """Write the logits of one text; whether ``cache`` could hold its keys and values."""
        cache.length = 0
        cache.rotary = self.rotary_of(len(ids))
        for start in range(0, len(ids), PROMPT_ROWS):
            piece = ids[start : start + PROMPT_ROWS]
            logits[start : start + len(piece)] = self.feed([cache], [piece], all_positions=True)
            if cache.overflowed:
                return False
        return True

    def rotary_of(self, length: int) -> int:
        """Which set of rotary frequencies a text of ``length`` tokens goes by."""
        return int(self.switch_length is not None and length > self.switch_length)

    def wider(self, precision: CachePrecision) -> CachePrecision:
        """The precision to go on with where a cache of ``precision`` overflowed.

        Raises ``UserError`` where the caller chose the precision.
        """
        what = f"keys or values exceed 65504, the greatest number of a {precision} key/value cache"
        if self._chosen is not None:
            instead = option("cache='float32'", "--cache float32")
            raise UserError(f"{what}. Give {instead} or int8, or leave it out: then the engine chooses")
        note = f"{what}: they were kept as float32, in twice the memory, after starting again"
        if note not in self.notes:
            self.notes.append(note)
        return "float32"

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

    def new_cache(
        self, positions: int | None = None, precision: CachePrecision | None = None
    ) -> tuple[_native.Cache, str]:
        """A cache for ``positions`` tokens (None: as many as the model's context or memory allow), and what limits it.

        Raises ``UserError`` with what fits where memory has no room for ``positions``, or for any.
        """
        precision = precision or self.precision
        each = self._decoder.bytes_per_position(precision)
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
            return self._decoder.cache(wanted, precision), limit
        except MemoryError:
            given = self._given(wanted, precision)
        if given == 0 or positions is not None:
            raise UserError(
                f"the system gives no memory for a key/value cache of {wanted} tokens ({bytes_text(wanted * each)}), "
                f"only for one of {given}. Ask for a shorter context or use the int8 cache"
            )
        return self._decoder.cache(given, precision), f"the system gives memory for {given} tokens of context"

    def _given(self, refused: int, precision: CachePrecision) -> int:
        """Tokens of a cache that the system gives where it refused one, found by halving; a share stays free."""
        size = refused
        while (size := size // 2 // BLOCK * BLOCK) > 0:
            try:
                self._decoder.cache(size, precision)
            except MemoryError:
                continue
            return max(BLOCK, int(SPARE * size) // BLOCK * BLOCK)
        return 0

    def _context(self) -> str:
        return f"this model's context is {self.maximum_length}"

    def bytes_per_token(self) -> int:
        """Bytes of weights that one decoded token reads: everything but an untied embedding, of which it reads a row."""
        return self._bytes_per_token
