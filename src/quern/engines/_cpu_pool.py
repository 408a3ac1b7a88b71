"""The key/value pool of a model of the CPU engine: pages that all of its sequences share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from quern import _native
from quern.core.errors import UserError
from quern.core.machine.memory import free_memory
from quern.core.text.units import bytes_text

CachePrecision = Literal["float32", "float16", "int8", "int4"]
"""From the widest to the narrowest."""
CACHES: tuple[CachePrecision, ...] = get_args(CachePrecision)
SPARE = 0.9
"""Share of the free memory that the pool may plan with."""
BLOCK = _native.CACHE_BLOCK
"""Positions of a page."""


def cache_bytes_per_token(layers: Sequence[tuple[int, int]], precision: CachePrecision) -> int:
    """Bytes that keys and values of one token take, scales included; ``layers``: heads and head_dim of each."""
    return _native.cache_page_bytes(layers, precision) // BLOCK


class Pool:
    """Pages of ``BLOCK`` positions for as many tokens as the free memory has room for, whatever sequences take them.

    The pool is planned when a sequence is opened and no other is open. A page costs memory once it is filled, and the memory
    goes back to the system with the last sequence.
    """

    def __init__(self, decoder: _native.Decoder, precision: CachePrecision) -> None:
        self._decoder = decoder
        self.precision: CachePrecision = precision
        self._page_bytes = decoder.page_bytes(precision)
        self.bytes_per_token = self._page_bytes // BLOCK
        """Of the keys and values of one token, unless a sequence keeps them wider."""
        self.most: int | None = None
        """Bytes that it may plan with; None: what is free."""
        self._pages: _native.Pool | None = None
        self._source = ""

    def open(self, *, wide: bool = False) -> _native.Sequence:
        """A sequence without tokens. ``wide``: of float32 numbers, in twice the pages of a float16 pool.

        Raises ``UserError`` where the memory has room for no page.
        """
        if self._pages is None or self._pages.sequences == 0:
            self._pages = None  # its addresses go first
            self._pages, self._source = self._planned()
        return self._pages.sequence(wide)

    def limit(self, tokens: int) -> str:
        """As a clause: what gives a sequence room for ``tokens`` tokens and no more."""
        others = 0 if self._pages is None else self._pages.sequences - 1
        beside = f" beside {others} other sequence{'s' if others > 1 else ''}" if others > 0 else ""
        return f"{self._source} {tokens} tokens of context{beside}"

    def refusal(self, tokens: int, sequence: _native.Sequence) -> UserError:
        """Why ``sequence`` cannot hold ``tokens`` tokens, and what to do."""
        each = self.bytes_per_token * (2 if sequence.wide else 1)
        return UserError(
            f"a key/value cache of {tokens} tokens takes {bytes_text(tokens * each)}; {self.limit(sequence.room)}. "
            f"Ask for a shorter context, {self._narrower}or free memory"
        )

    @property
    def _narrower(self) -> str:
        """What takes less than this precision, as the beginning of a list of ways out; empty where nothing does."""
        names = [name for name in CACHES[CACHES.index(self.precision) + 1 :] if name.startswith("int")]
        return f"use the {' or '.join(names)} cache, " if names else ""

    def _planned(self) -> tuple[_native.Pool, str]:
        free = int(SPARE * free_memory())
        limited = self.most is not None and self.most < free
        source = f"the {'limit of' if limited else 'free'} memory has room for"
        fits = (self.most if self.most is not None and limited else free) // self._page_bytes
        if fits < 1:
            raise UserError(
                f"{BLOCK} tokens of a key/value cache take {bytes_text(self._page_bytes)}; {source} "
                f"0 tokens. To go on, {self._narrower}or free memory"
            )
        try:
            return self._decoder.pool(fits, self.precision), source
        except MemoryError:
            given = self._given(fits)
        if given == 0:
            raise UserError(
                f"the system gives no memory for {BLOCK} tokens of a key/value cache "
                f"({bytes_text(self._page_bytes)}). To go on, {self._narrower}or raise the limit of the process"
            )
        return self._decoder.pool(given, self.precision), "the system gives memory for"

    def _given(self, refused: int) -> int:
        """Pages that the system gives where it refused so many, found by halving; a share of them stays free."""
        pages = refused
        while (pages := pages // 2) > 0:
            try:
                self._decoder.pool(pages, self.precision)
            except MemoryError:
                continue
            return max(1, int(SPARE * pages))
        return 0
