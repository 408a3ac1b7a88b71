"""What a person sees of jobs that are not finished."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from quern.cli.views.columns import add, duration, size
from quern.cli.views.columns import table as plain_table
from quern.core.text.language import gettext, ngettext, translatable

if TYPE_CHECKING:
    from quern.pipeline.status import JobStatus, Status, TaskStatus

TASKS = (
    *(translatable("token weights"), translatable("quantizing blocks"), translatable("losses of candidates")),
    *(translatable("losses of embedding and head"), translatable("teacher"), translatable("writing blocks")),
    *(translatable("training"), translatable("timing"), translatable("scoring"), translatable("inputs of linears")),
    *(translatable("reference logits"), translatable("hashing the checkpoint")),
)
"""What jobs call their tasks."""


def status(found: Status) -> RenderableType:
    """A table for each job, or the word that all is done."""
    if not found.jobs:
        return Text(gettext("{path} is finished; no job writes it", path=found.path))
    return Group(*(_job(job) for job in found.jobs))


def _job(job: JobStatus) -> RenderableType:
    facts = plain_table((gettext("job"), str(job.output)))
    if job.recipe is not None:
        add(facts, gettext("recipe"), job.recipe)
    running = job.process is not None
    by = gettext("by process {process}", process=job.process)
    add(facts, gettext("worked on"), by if running else gettext("by nobody; the same command continues it"))
    if job.last_step is not None:
        finished = ngettext(
            "{count} block; last step: {step}",
            "{count} blocks; last step: {step}",
            job.blocks,
            count=job.blocks,
            step=job.last_step,
        )
        add(facts, gettext("finished"), finished)
    for task in job.tasks:
        add(facts, gettext(task.description), _task(task, running))
    if job.seconds_ago is not None:
        add(facts, gettext("as of"), gettext("{time} ago", time=duration(job.seconds_ago)))
    add(facts, gettext("on the disk"), gettext("{size} in {folder}", size=size(job.bytes), folder=job.folder))
    return facts


def _task(task: TaskStatus, running: bool) -> str:
    done = f"{100 * task.done / task.total:.0f} %" if task.total else gettext("begun")
    if task.total < 1_000_000:
        done = gettext("{done} of {total}", done=format(task.done, "g"), total=format(task.total, "g"))
    text = gettext("{done} after {time}", done=done, time=duration(task.seconds))
    if task.seconds_left is None or not running:
        return text
    return gettext("{progress}, {time} left", progress=text, time=duration(task.seconds_left))
