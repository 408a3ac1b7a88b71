"""Workers whose pieces go as far as a byte string and back: what another process would be handed, without one."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from quern.core.machine.parallel import Lent, Workers, fetched


@dataclass(frozen=True)
class Kept(Lent):
    """A value as it was when it was lent."""

    data: bytes

    def fetch(self) -> Any:
        return pickle.loads(self.data)


class TravellingWorkers(Workers):
    """Counts the pieces, by the function that carries them out."""

    elsewhere = True
    waves_at_once = 2
    pieces: dict[str, int]

    def __init__(self, threads: int | None = None) -> None:
        super().__init__(threads)
        TravellingWorkers.pieces = {}

    def lend(self, value: Any) -> Any:
        return value if isinstance(value, Lent) else Kept(pickle.dumps(value))

    def spread(self, function: Callable[[Any, Any], Any], shared: Any, items: Iterable[Any]) -> list[Any]:
        packed = [pickle.dumps((function, self.lend(shared), item)) for item in items]
        self.pieces[function.__name__] = self.pieces.get(function.__name__, 0) + len(packed)
        return [pickle.loads(found) for found in self.map(_carried_out, packed)]


def _carried_out(packed: bytes) -> bytes:
    function, lent, item = pickle.loads(packed)
    return pickle.dumps(function(fetched(lent), item))
