"""Tasks of lm-eval's suites (``hellaswag``, ``arc_easy``, ...) by their names, or from files of one's own.

The adapter that answers a task's requests is in ``lm_eval.py``. Data sets of the suites come from the Hugging Face Hub; a
task of one's own names its files.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quern.core.engine import LoadedModel
from quern.core.errors import QuernError, UserError, option
from quern.core.text.suggest import did_you_mean
from quern.evaluation.lm_eval import language_model
from quern.texts.tokens import Tokenizer

_TASKS = option("tasks", "--tasks")
_COUNTS = ("sample_len", "samples")
"""What lm-eval puts beside a task's metrics."""
NOT_INSTALLED = "lm-eval is not installed. Run: pip install 'quern[lm-eval]'"


@dataclass(frozen=True, kw_only=True)
class TaskList:
    """Which tasks are run, and on how much."""

    names: tuple[str, ...]
    folder: Path | None = None
    """Of further tasks (lm-eval's YAML); None: lm-eval's own alone."""
    limit: int | None = None
    """Items of each task, from its beginning; None: all."""

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) < len(self.names):
            raise UserError(f"{_TASKS}: one or several names, each once; got {', '.join(self.names) or 'none'}")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"{option('limit', '--limit')} must be 1 or more items of each task, not {self.limit}")

    def to_json(self) -> dict[str, Any]:
        """Plain data; ``from_json`` reads it back."""
        folder = None if self.folder is None else str(self.folder)
        return {"names": list(self.names), "folder": folder, "limit": self.limit}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TaskList:
        """What ``to_json`` gave."""
        folder = None if data["folder"] is None else Path(data["folder"])
        return cls(names=tuple(data["names"]), folder=folder, limit=data["limit"])


Scores = dict[str, dict[str, float]]
"""By task: lm-eval's metrics by lm-eval's names (``acc``, ``acc_norm``, ...), the standard error of each as
``<metric>_stderr`` where lm-eval gives one. A filter other than ``none`` stays in the name: ``exact_match,strict``."""


def check_tasks(tasks: TaskList) -> None:
    """Raise ``UserError`` where lm-eval is not installed, or does not know one of the tasks, before anything is measured."""
    known = _manager(tasks).all_tasks
    for name in tasks.names:
        if name not in known:
            where = "lm-eval" if tasks.folder is None else f"lm-eval with {tasks.folder}"
            own = option("tasks_path=FOLDER", "--tasks-path FOLDER")
            raise UserError(
                f"{_TASKS}: {where} knows no task {name!r}. `lm-eval ls tasks` lists them; "
                f"{own} adds those of a folder{did_you_mean(name, known)}"
            )


def wanted_tasks(names: Sequence[str] | None, folder: str | Path | None, limit: int | None) -> TaskList | None:
    """The tasks that were asked for, if any, all of them known. Raises ``UserError``."""
    if names is None:
        if folder is None and limit is None:
            return None
        given = option("tasks_path", "--tasks-path") if folder is not None else option("limit", "--limit")
        raise UserError(f"{given} is about tasks of lm-eval; name them with {option('tasks', '--tasks')}")
    found = TaskList(names=tuple(names), folder=None if folder is None else Path(folder), limit=limit)
    check_tasks(found)
    return found


def score_tasks(model: LoadedModel, tokenizer: Tokenizer, tasks: TaskList, seed: int) -> Scores:
    """Run the tasks. Raises ``UserError`` where lm-eval is not installed, or cannot run them (no network, say)."""
    manager = _manager(tasks)
    adapter = language_model(model, tokenizer)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    try:
        found = _lm_eval("lm_eval").simple_evaluate(
            model=adapter, tasks=list(tasks.names), task_manager=manager, limit=tasks.limit, log_samples=False, **seeds
        )
    except QuernError:
        raise
    except Exception as error:  # of lm-eval, of a data set's library, or of the task's own code
        reason = " ".join(str(error).split())
        raise UserError(f"lm-eval cannot run {', '.join(tasks.names)}: {type(error).__name__}: {reason}") from error
    return {name: _numbers(metrics) for name, metrics in found["results"].items()}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Figures only: aliases and errors that were not computed are left out."""
    plain = {name.removesuffix(",none"): value for name, value in metrics.items()}
    return {
        name: float(value)
        for name, value in plain.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and name not in _COUNTS
    }


def _manager(tasks: TaskList) -> Any:
    """lm-eval's index of tasks. Raises ``UserError``."""
    if tasks.folder is not None and not tasks.folder.is_dir():
        raise UserError(f"{option('tasks_path', '--tasks-path')}: {tasks.folder} is no folder")
    manager = _lm_eval("lm_eval.tasks").TaskManager
    return manager(include_path=None if tasks.folder is None else str(tasks.folder))


def _lm_eval(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("lm_eval"):
            raise
        raise UserError(NOT_INSTALLED) from None
