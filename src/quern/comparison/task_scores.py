"""Tasks of lm-eval on one model, in a process of its own: what the suites' libraries load is then not this process's."""

from __future__ import annotations

from quern.checkpoint.checkpoint import Checkpoint
from quern.comparison.worker_process import Launch, Worker
from quern.core.progress import Progress
from quern.engines.cpu import CachePrecision
from quern.evaluation.tasks import Scores, TaskList

SILENCE_S = 24 * 3600.0
"""lm-eval says nothing between the beginning of all tasks and their end, and whole suites take hours."""


def task_scores(
    checkpoint: Checkpoint,
    engine: str,
    tasks: TaskList,
    *,
    dtype: str,
    threads: int | None,
    seed: int,
    progress: Progress,
    cache: CachePrecision | None = None,
) -> Scores:
    """What ``tasks`` give for the model in the engine called ``engine``; ``cache``: see ``CpuEngine.load``.

    Raises ``UserError`` and ``WorkerError``.
    """
    progress.log(f"running {', '.join(tasks.names)} by lm-eval")
    path = str(checkpoint.path)
    with Worker(f"lm-eval with {checkpoint.path.name}", Launch(silence_s=SILENCE_S)) as worker:
        chosen = {} if cache is None else {"cache": cache}
        worker.ask({"do": "load", "engine": engine, "path": path, "dtype": dtype, "threads": threads, **chosen})
        answer = worker.ask({"do": "tasks", "tasks": tasks.to_json(), "tokenizer": path, "seed": seed})
    return {str(name): dict(metrics) for name, metrics in answer["scores"].items()}
