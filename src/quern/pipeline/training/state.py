"""The state of a training on disk: every few minutes and whenever it is the best, so that a killed one continues."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from quern.checkpoint.jobs.work_folder import WorkFolder
from quern.quantization.training.loop import History

STATE, BEST = "state", "best"
STATE_SECONDS = 180.0
"""After so long the state is written down again."""


class StateFiles:
    """Two states in the work folder, the last one and the best one; the same file where they are one."""

    def __init__(self, work: WorkFolder) -> None:
        self._work, self._written = work, time.monotonic()

    def history(self) -> History:
        """That of the last state; a new one where there is none."""
        found = self._work.done(STATE)
        if found is None:
            return History()
        history = found["history"]
        return History(**{**history, "heldout": [tuple(entry) for entry in history["heldout"]]})

    def keep(self, history: History, best: bool, state: Callable[[], dict[str, Tensor]]) -> None:
        """See ``quantization.training.loop.Keeper``."""
        if not best and time.monotonic() - self._written < STATE_SECONDS:
            return
        name, before = f"{STATE}/{history.step:08d}", self._names()
        path = self._work.write_tensors(name, state())
        data: dict[str, Any] = {"name": name}
        if best:
            self._work.finish(BEST, [path], data)
        self._work.finish(STATE, [path], {**data, "history": history.to_json()})
        for old in before - self._names():
            self._work.path(f"{old}.safetensors").unlink(missing_ok=True)
        self._written = time.monotonic()

    def _names(self) -> set[str]:
        return {found["name"] for step in (STATE, BEST) if (found := self._work.done(step)) is not None}

    def last(self) -> dict[str, Tensor]:
        """The tensors of the last state."""
        return self._read(STATE)

    def best(self) -> dict[str, Tensor]:
        """The tensors of the best state."""
        return self._read(BEST)

    def _read(self, step: str) -> dict[str, Tensor]:
        found = self._work.done(step)
        assert found is not None, "a state was kept"
        return self._work.read_tensors(found["name"])
