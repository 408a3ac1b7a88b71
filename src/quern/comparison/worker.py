"""The process of a contender that one of quern's engines runs: ``python -m quern.comparison.worker``.

What it answers: ``quern.evaluation.worker``. And, once a model is loaded:

- ``tasks``: ``tasks`` (a ``TaskList``), ``tokenizer`` (path), ``seed`` -> ``scores`` by task
"""

from __future__ import annotations

from typing import Any

from quern.checkpoint.tokenizer import load_tokenizer
from quern.core.engine import LoadedModel
from quern.engines.base import ENGINES
from quern.engines.cpu import CpuEngine, cache_named
from quern.evaluation.tasks import TaskList, score_tasks
from quern.evaluation.worker import Answer, serve


class Tasks:
    """Loads a model and runs tasks of lm-eval on it."""

    def __init__(self) -> None:
        self._model: LoadedModel | None = None

    def load(self, path: str, **options: Any) -> LoadedModel:
        """``load``, and the model is kept."""
        self._model = load(path, **options)
        return self._model

    def run(self, tasks: dict[str, Any], tokenizer: str, seed: int) -> Answer:
        """The answer to ``tasks``."""
        assert self._model is not None, "the first request must be load"
        scores = score_tasks(self._model, load_tokenizer(tokenizer), TaskList.from_json(tasks), seed)
        return {"scores": scores}


def load(path: str, *, threads: int | None, engine: str, dtype: Any, cache: str | None = None) -> LoadedModel:
    """The model at ``path`` in the engine of that name; ``cache``: how the cpu engine keeps keys and values."""
    if (precision := cache_named(cache, engine)) is not None:
        return CpuEngine().load(path, dtype=dtype, threads=threads, cache=precision)
    return ENGINES.get(engine)().load(path, dtype=dtype, threads=threads)


def main() -> None:
    """Answer requests until ``quit`` or the end of stdin."""
    tasks = Tasks()
    serve(tasks.load, {"tasks": tasks.run})


if __name__ == "__main__":
    main()
