"""Embeddings: one vector for a whole text, of what the model's head would read.

Texts are read in pieces between the steps of answers, several short ones in one pass over the weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from quern.checkpoint.files import read_json
from quern.core.engine import BatchModel, SwitchingModel
from quern.core.errors import UserError, option

Pooling = Literal["mean", "last"]
POOLINGS: tuple[Pooling, ...] = ("mean", "last")
Vectors = NDArray[np.float32]


class Embedder:
    """Requests for embeddings, in the order in which they came."""

    def __init__(self, model: BatchModel) -> None:
        self._model = model
        self._jobs: deque[_Job] = deque()
        self._switch_length = model.switch_length if isinstance(model, SwitchingModel) else None

    def __len__(self) -> int:
        """Requests that are not done."""
        return len(self._jobs)

    def submit(self, texts: Sequence[list[int]], pooling: Pooling) -> Future[Vectors]:
        """Vectors ``(len(texts), width)`` of texts of one token and more, once they are read; cancelled, they are not."""
        job = _Job([_Text(ids, pooling) for ids in texts], Future())
        self._jobs.append(job)
        return job.future

    def step(self, most: int, make_room: Callable[[], bool]) -> int:
        """Read a piece of at most ``most`` tokens; how many that were.

        ``make_room`` is asked where the pool is full: whether there may be more room next time.
        """
        for job in list(self._jobs):  # others may come meanwhile
            if job.future.cancelled():
                self._jobs.remove(job)
                job.close()
        batch = self._batch(most)
        if not batch:
            return 0
        pieces = [tokens for _, _, tokens in batch]
        try:
            steps = [(text.opened(self._model), tokens) for _, text, tokens in batch]
            states = self._model.hidden_states(steps).numpy()
        except Exception as error:
            if not (isinstance(error, UserError) and make_room()):
                self._fail(batch[0][0], error)
            return 0
        ends = np.cumsum([len(tokens) for tokens in pieces])
        for (_, text, _), rows in zip(batch, np.split(states, ends[:-1]), strict=True):
            text.add(rows)
        while self._jobs and self._jobs[0].read:
            self._jobs.popleft().tell()
        return int(ends[-1])

    def stop(self) -> None:
        """Nobody is answered any more."""
        while self._jobs:
            job = self._jobs.popleft()
            job.future.cancel()
            job.close()

    def _batch(self, left: int) -> list[tuple[_Job, _Text, list[int]]]:
        batch = list[tuple[_Job, _Text, list[int]]]()
        for job in list(self._jobs):
            for text in job.texts:
                if left <= 0:
                    return batch
                # A text that goes by the rotary frequencies of long ones must not begin as a short one.
                long = self._switch_length is not None and len(text.ids) > self._switch_length
                tokens = text.ids[text.count :] if long else text.ids[text.count : text.count + left]
                if tokens:
                    batch.append((job, text, tokens))
                    left -= len(tokens)
        return batch

    def _fail(self, job: _Job, error: Exception) -> None:
        self._jobs.remove(job)
        job.fail(error)


class _Text:
    def __init__(self, ids: list[int], pooling: Pooling) -> None:
        self.ids, self._pooling = ids, pooling
        self.count = 0
        """Tokens that were read."""
        self._sequence: Any = None
        self._sum: Any = 0.0

    @property
    def vector(self) -> Vectors:
        """Once all is read."""
        return np.asarray(self._sum, np.float32)

    def opened(self, model: BatchModel) -> Any:
        if self._sequence is None:
            self._sequence = model.open()
        return self._sequence

    def add(self, rows: Vectors) -> None:
        """What was read next."""
        self.count += len(rows)
        if self._pooling == "mean":
            self._sum = self._sum + rows.sum(0, dtype=np.float64) / len(self.ids)
        elif self.count == len(self.ids):
            self._sum = rows[-1].copy()
        if self.count == len(self.ids):
            self.close()

    def close(self) -> None:
        if self._sequence is not None:
            self._sequence.close()
        self._sequence = None


@dataclass(eq=False)
class _Job:
    texts: list[_Text]
    future: Future[Vectors]

    @property
    def read(self) -> bool:
        return all(text.count == len(text.ids) for text in self.texts)

    def close(self) -> None:
        for text in self.texts:
            text.close()

    def tell(self) -> None:
        with suppress(InvalidStateError):  # cancelled at the last moment
            self.future.set_result(np.stack([text.vector for text in self.texts]))

    def fail(self, error: Exception) -> None:
        self.close()
        with suppress(InvalidStateError):
            self.future.set_exception(error)


def pooling_named(name: str, path: Path) -> Pooling:
    """The pooling called ``name``; ``auto``: what sentence-transformers' files in ``path`` say, without them the mean.

    Raises ``UserError``.
    """
    if name == "auto":
        return _trained(path / "1_Pooling" / "config.json")
    for known in POOLINGS:
        if name == known:
            return known
    given = option(f"pooling={name!r}", f"--pooling {name}")
    raise UserError(f"{given} is not known; give one of auto, {', '.join(POOLINGS)}")


def _trained(file: Path) -> Pooling:
    said = read_json(file) if file.is_file() else {"pooling_mode_mean_tokens": True}
    if said.get("pooling_mode_lasttoken") is True or said.get("pooling_mode") == "lasttoken":
        return "last"
    if said.get("pooling_mode_mean_tokens") is True or said.get("pooling_mode") == "mean":
        return "mean"
    raise UserError(
        f"{file} asks for a pooling that is not known; known are the mean and the last token. Choose one by "
        f"{option('pooling', '--pooling')}"
    )


def scaled(vectors: Vectors, dimensions: int | None = None) -> Vectors:
    """The first ``dimensions`` numbers of each (None: all), of length 1."""
    kept = vectors[:, :dimensions].astype(np.float64)
    lengths = np.linalg.norm(kept, axis=1, keepdims=True)
    return (kept / np.where(lengths > 0, lengths, 1)).astype(np.float32)
