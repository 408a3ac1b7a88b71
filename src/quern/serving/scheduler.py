"""Requests of many people on one model: continuous batching.

Each step feeds every running request its next token, and pieces of prompts beside them, in one pass over the weights. So
requests join and leave between steps, and nobody waits longer than a piece of a prompt takes. A step's results are those
that each request would get alone, so nobody sees the others but in time.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quern.checkpoint.panics import panics_as_errors
from quern.core.engine import BatchModel
from quern.core.errors import QuernError, UserError
from quern.generation.prefixes import Prefixes
from quern.generation.speculation.speculation import DraftCounts, Speculation
from quern.serving.embedding import Embedder, Pooling, Vectors
from quern.serving.guessing import Guessing
from quern.serving.request import FinishReason, GenerationRequest
from quern.serving.running import Running, Tell

log = logging.getLogger("quern.serving")


class QueueFullError(QuernError):
    """More requests wait than the server takes."""


@dataclass(frozen=True)
class Limits:
    """What a scheduler takes on."""

    parallel: int = 8
    """Requests that run at once."""
    waiting: int = 64
    """Requests that wait beside them; more are refused."""
    prompt_tokens: int = 256
    """Tokens of prompts in one step: what bounds the pause of those that are answered meanwhile."""


@dataclass
class Counts:
    """What a scheduler has done since it started."""

    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    steps: int = 0
    preempted: int = 0


class Scheduler:
    """Runs requests on a model, in a thread of its own from ``start`` to ``stop``."""

    def __init__(
        self,
        model: BatchModel,
        decode: Callable[[list[int]], str],
        ends: frozenset[int],
        limits: Limits = Limits(),
        context: int | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        """``context``: tokens of a text with its answer, at most; None: as many as the model knows positions."""
        self.model, self.limits, self.counts = model, limits, Counts()
        self.context = min(context or model.maximum_length, model.maximum_length)
        self._guessing = Guessing(speculation, self.context)
        self._embedder = Embedder(model)
        self._decode, self._ends = decode, ends
        self._prefixes = Prefixes()
        self._waiting: deque[Running] = deque()
        self._running: list[Running] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._crowded = False
        """Whether a request gave way: nobody joins until one of the others is done."""

    @property
    def waiting(self) -> int:
        """Requests that have not begun, and those for embeddings."""
        return len(self._waiting) + len(self._embedder)

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return len(self._running)

    @property
    def kept(self) -> int:
        """Finished texts that others may begin with."""
        return len(self._prefixes)

    @property
    def drafts(self) -> DraftCounts:
        """What became of guesses."""
        return self._guessing.counts

    def start(self) -> None:
        """Begin to answer."""
        self._thread = threading.Thread(target=self._run, name="quern-scheduler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End all requests as cancelled, and the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def submit(self, request: GenerationRequest, tell: Tell) -> Running:
        """Take a request; ``tell`` gets its events, in the scheduler's thread, and must not block.

        Raises ``QueueFullError``, and ``UserError`` for a prompt that the context has no room to continue.
        """
        if len(request.ids) >= self.context:
            raise UserError(
                f"the prompt has {len(request.ids)} tokens and the context is {self.context}, which leaves no room to "
                "answer; give a shorter one"
            )
        running = Running(request, tell, self._decode, self._ends)
        with self._changed:
            if len(self._waiting) >= self.limits.waiting:
                self.counts.refused += 1
                raise QueueFullError(f"{len(self._waiting)} requests wait already; try again later")
            self.counts.requests += 1
            self._waiting.append(running)
            self._changed.notify_all()
        return running

    def embed(self, texts: Sequence[list[int]], pooling: Pooling) -> Future[Vectors]:
        """Vectors ``(len(texts), hidden_size)`` of texts of one token and more. Raises ``QueueFullError``."""
        with self._changed:
            if len(self._embedder) >= self.limits.waiting:
                self.counts.refused += 1
                raise QueueFullError(f"{len(self._embedder)} requests wait already; try again later")
            self.counts.requests += 1
            future = self._embedder.submit(texts, pooling)
            self._changed.notify_all()
        return future

    def cancel(self, running: Running) -> None:
        """Nobody wants the rest of an answer."""
        with self._changed:
            running.cancelled = True
            self._changed.notify_all()

    def wake(self) -> None:
        """Whoever was paused may go on."""
        with self._changed:
            self._changed.notify_all()

    def _idle(self) -> bool:
        """Whether there is nothing to do until something changes."""
        places = len(self._running) < self.limits.parallel and not (self._crowded and self._running)
        wanted = len(self._embedder) > 0 or (self._waiting and places)
        return not wanted and all(one.paused and not one.cancelled for one in self._running)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._stopping and self._idle():
                    self._changed.wait()
                if self._stopping:
                    break
            try:
                self.step()
            except Exception as error:  # the server goes on with other requests
                log.error("a step failed", exc_info=error)
                for running in list(self._running):
                    self._drop(running, error)
        for running in [*self._running, *self._waiting]:
            self._end(running, FinishReason.CANCELLED)
        self._embedder.stop()

    def step(self) -> None:
        """Admit, feed once, tell. Whoever drives a scheduler without its thread calls this."""
        for running in [*self._running, *self._waiting]:
            if running.cancelled:
                self._end(running, FinishReason.CANCELLED)
        self._admit()
        embedded = self._embed()
        batch = self._batch(self.limits.prompt_tokens - embedded)
        if not batch:
            return
        drafts = self._guessing.drafts(batch)
        try:
            logits = self._feed(batch, drafts)
        except UserError as error:
            self._make_room(batch, error)
            return
        except Exception as error:  # of the engine; the server goes on with other requests
            for running, _ in batch:
                self._drop(running, error)
            return
        self.counts.steps += 1
        ends = np.cumsum([1 + len(draft) for draft in drafts])
        for (running, tokens), draft, rows in zip(batch, drafts, np.split(logits, ends[:-1]), strict=True):
            self._read(running, tokens, draft, rows)

    def _feed(self, batch: list[tuple[Running, list[int]]], drafts: list[list[int]]) -> NDArray[np.float32]:
        """Logits after what is fed and after each guess. Where guesses have no room, they are taken out of ``drafts``."""
        steps = []
        for (running, tokens), draft in zip(batch, drafts, strict=True):
            assert running.text is not None
            steps.append((running.text.sequence, [*tokens, *draft]))
        try:
            return self.model.step(steps, [len(draft) for draft in drafts]).numpy()
        except UserError:
            if not any(drafts):
                raise
            drafts[:] = [[] for _ in batch]
            return self._feed(batch, drafts)

    def _embed(self) -> int:
        """Read a piece of what is to be embedded; how many tokens. Prompts that are being read have half of a step."""
        reading = len(self._embedder) > 0 and any(len(one.pending) > 1 for one in self._running)
        read = self._embedder.step(self.limits.prompt_tokens // (2 if reading else 1), self._may_have_room)
        self.counts.prompt_tokens += read
        return read

    def _may_have_room(self) -> bool:
        """Whether there may be room for more soon: a finished text went, or somebody is at work."""
        return self._prefixes.evict() or any(not one.paused for one in self._running)

    def _admit(self) -> None:
        """Begin with requests that wait, in the order in which they came, while there are places."""
        self._crowded = self._crowded and bool(self._running)
        while len(self._running) < self.limits.parallel and not self._crowded:
            with self._changed:
                if not self._waiting:
                    return
                running = self._waiting.popleft()
            try:
                running.text = self._prefixes.opened(self.model, running.wanted)
            except UserError as error:
                if self._prefixes.evict() or self._running:
                    with self._changed:
                        self._waiting.appendleft(running)
                    if self._running:
                        return
                    continue
                running.fail(error)
                continue
            except Exception as error:  # of the engine: whoever asked is told, and others go on
                running.fail(error)
                continue
            shared = len(running.text.ids)
            running.cached = max(running.cached, min(shared, len(running.request.ids)))
            self.counts.cached_tokens += shared
            self._running.append(running)

    def _batch(self, left: int) -> list[tuple[Running, list[int]]]:
        """Next tokens of all that write, and up to ``left`` tokens of prompts of those that do not yet, oldest first."""
        batch = []
        for running in self._running:
            if running.paused:
                continue
            pending = running.pending
            if len(pending) > 1:
                pending = pending[: max(left, 0)]
                left -= len(pending)
            if pending:
                batch.append((running, pending))
        return batch

    def _read(self, running: Running, tokens: list[int], draft: list[int], logits: NDArray[np.float32]) -> None:
        """A sequence has read ``tokens`` and guesses, and gave ``logits`` after the last token and after each guess."""
        assert running.text is not None
        running.text.ids += tokens
        if running.pending:
            self._prefixes.note(running.text)
            self.counts.prompt_tokens += len(tokens)
            return
        if len(tokens) > 1 or not running.written:
            self._prefixes.note(running.text)
            self.counts.prompt_tokens += len(tokens)
        try:
            with panics_as_errors():
                right = self._write(running, draft, logits)
        except Exception as error:
            self._drop(running, error)
            return
        if draft:
            running.text.ids += draft[:right]
            running.text.sequence.rewind(len(running.text.ids))
        self._guessing.tell(running, len(draft), right)
        if running.done:
            self._gone(running)
            self._prefixes.keep(running.text)
            self._crowded = False

    def _write(self, running: Running, draft: list[int], logits: NDArray[np.float32]) -> int:
        """Choose tokens while they are those that were guessed, and the first other one; how many guesses were right."""
        for place, row in enumerate(logits):
            if place > 0 and np.isnan(row[0]):
                return place
            before = len(running.written)
            running.choose(row)
            self.counts.written_tokens += 1
            if not running.done and len(running.wanted) >= self.context:
                running.finish(FinishReason.LENGTH)
            written = running.written[before:]
            if not written or written != draft[place : place + 1]:
                return place
            if running.done:
                return place + 1
        raise AssertionError("what is chosen after the last guess is no guess")

    def _make_room(self, batch: list[tuple[Running, list[int]]], error: UserError) -> None:
        """A step did not fit: finished texts go first, then whoever came last begins again later, or alone gives up."""
        if self._prefixes.evict():
            return
        last = self._running[-1]
        if len(self._running) > 1:
            self.counts.preempted += 1
            self._crowded = True
            self._leave(last)
            with self._changed:
                self._waiting.appendleft(last)
        elif last.written:
            last.finish(FinishReason.LENGTH)
            self._leave(last)
        else:
            self._drop(last, error)

    def _end(self, running: Running, reason: FinishReason) -> None:
        running.finish(reason)
        if running in self._running:
            self._gone(running)
            assert running.text is not None
            self._prefixes.keep(running.text)
        else:
            with self._changed:
                self._waiting.remove(running)

    def _drop(self, running: Running, error: Exception) -> None:
        running.fail(error)
        self._leave(running)

    def _gone(self, running: Running) -> None:
        """It runs no more."""
        self._running.remove(running)
        self._guessing.forget(running)

    def _leave(self, running: Running) -> None:
        """Give its sequence back."""
        self._gone(running)
        assert running.text is not None
        self._prefixes.forget(running.text)
        running.text = None
