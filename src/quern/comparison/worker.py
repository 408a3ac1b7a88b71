"""The process of a contender that one of quern's engines runs: ``python -m quern.comparison.worker``.

What it answers: ``quern.evaluation.worker``.
"""

from __future__ import annotations

from typing import Any

from quern.core.engine import LoadedModel
from quern.engines.base import ENGINES
from quern.evaluation.worker import serve


def load(path: str, *, threads: int | None, engine: str, dtype: Any) -> LoadedModel:
    """The model at ``path`` in the engine of that name."""
    return ENGINES.get(engine)().load(path, dtype=dtype, threads=threads)


def main() -> None:
    """Answer requests until ``quit`` or the end of stdin."""
    serve(load)


if __name__ == "__main__":
    main()
