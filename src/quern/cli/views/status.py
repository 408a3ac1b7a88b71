"""What a person sees of jobs that are not finished."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from quern.cli.views.columns import add, duration, size
from quern.cli.views.columns import table as plain_table

if TYPE_CHECKING:
    from quern.pipeline.status import JobStatus, Status, TaskStatus


def status(found: Status) -> RenderableType:
    """A table for each job, or the word that all is done."""
    if not found.jobs:
        return Text(f"{found.path} is finished; no job writes it")
    return Group(*(_job(job) for job in found.jobs))


def _job(job: JobStatus) -> RenderableType:
    facts = plain_table(("job", str(job.output)))
    if job.recipe is not None:
        add(facts, "recipe", job.recipe)
    running = job.process is not None
    add(facts, "worked on", f"by process {job.process}" if running else "by nobody; the same command continues it")
    if job.last_step is not None:
        add(facts, "finished", f"{job.blocks} {'block' if job.blocks == 1 else 'blocks'}; last step: {job.last_step}")
    for task in job.tasks:
        add(facts, task.description, _task(task, running))
    if job.seconds_ago is not None:
        add(facts, "as of", f"{duration(job.seconds_ago)} ago")
    add(facts, "on the disk", f"{size(job.bytes)} in {job.folder}")
    return facts


def _task(task: TaskStatus, running: bool) -> str:
    done = f"{100 * task.done / task.total:.0f} %" if task.total else "begun"
    if task.total < 1_000_000:
        done = f"{task.done:g} of {task.total:g}"
    left = "" if task.seconds_left is None or not running else f", {duration(task.seconds_left)} left"
    return f"{done} after {duration(task.seconds)}{left}"
