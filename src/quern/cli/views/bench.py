"""What a person sees of a measured server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from quern.cli.views.columns import NOT_MEASURED, add, table
from quern.core.text.language import gettext, ngettext
from quern.core.text.units import significant

if TYPE_CHECKING:
    from quern.serving.benchmark.results import Load, LoadResult, Milliseconds, ServingResults


def serving(found: ServingResults) -> RenderableType:
    """A line for each load; times in milliseconds."""
    workload, server = found.workload, found.server
    asked = gettext(
        "{model} at {url}: prompts of {prompt} tokens, {shared} of them shared, answers of {answer}",
        model=server.path or server.model or NOT_MEASURED,
        url=server.url,
        prompt=workload.prompt_tokens,
        shared=f"{100 * workload.shared_prefix:.0f} %",
        answer=workload.answer_tokens,
    )
    headings = (
        *(gettext("load"), gettext("answers"), gettext("requests/s"), gettext("output tokens/s")),
        *(gettext("total tokens/s"), gettext("TTFT p50, ms"), gettext("TTFT p99, ms"), gettext("ITL p50, ms")),
        *(gettext("ITL p99, ms"), gettext("TPOT mean, ms")),
    )
    made = table(headings, right=range(1, len(headings)))
    for one in found.loads:
        add(made, *_line(one))
    legend = gettext(
        "TTFT: time to first token; ITL: between two pieces of an answer; TPOT: per token after the first. A load is a "
        "number of requests at once, or a rate."
    )
    return Group(Text(asked), made, *_problems(found), Text(legend))


def _line(one: LoadResult) -> list[str]:
    return [
        _load(one.load),
        str(one.completed),
        significant(one.request_throughput),
        significant(one.output_throughput),
        significant(one.total_token_throughput),
        _time(one.ttft_ms, "median"),
        _time(one.ttft_ms, "p99"),
        _time(one.itl_ms, "median"),
        _time(one.itl_ms, "p99"),
        _time(one.tpot_ms, "mean"),
    ]


def _load(load: Load) -> str:
    if load.rate is not None:
        return gettext("{rate} a second", rate=significant(load.rate))
    return gettext("{count} at once", count=load.concurrency)


def _time(spread: Milliseconds | None, figure: str) -> str:
    return NOT_MEASURED if spread is None else significant(getattr(spread, figure))


def _problems(found: ServingResults) -> list[Text]:
    said = []
    for one in found.loads:
        for error, count in one.errors.items():
            failed = ngettext("{count} request failed", "{count} requests failed", count, count=count)
            said.append(Text(f"{_load(one.load)}: {failed}: {error}", style="red"))
    if found.interrupted:
        said.append(Text(gettext("Interrupted: the last load has fewer answers than were asked for.")))
    return said
