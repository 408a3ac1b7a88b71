"""What a person sees of each result: Rich tables and sentences. No number is computed here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from quern.advisor.retold import retold
from quern.cli.views.columns import (
    add,
    comparison_columns,
    duration,
    further_columns,
    heading,
    interval,
    number,
    percent,
    size,
)
from quern.cli.views.columns import table as plain_table
from quern.cli.views.comparison import Comparison, remarks
from quern.core.results import Recommendation, Results, Row
from quern.core.text.language import gettext, ngettext, pgettext
from quern.core.text.units import significant

if TYPE_CHECKING:
    from quern.pipeline.inspect import Inspection, TensorRow
    from quern.pipeline.quantize import QuantizeReport

WORST_LINEARS = 5
CACHE_LENGTHS = (4096, 32768)
"""Tokens of text whose keys and values are shown beside those of the whole context."""
_EXPERT = re.compile(r"\.experts\.\d+\.")


def results(found: Results) -> RenderableType:
    """The comparison's table, where each row stands, what failed, and the recommendation."""
    noise = {item.kl_noise_floor for item in found.rows if item.kl_noise_floor is not None}
    floor = (
        [Text(gettext("KL noise floor: {floor} nats a token", floor=significant(max(noise), 2)), style="dim")]
        if noise
        else []
    )
    return Group(Comparison(found), *floor, *remarks(found), Text(), recommendation(retold(found)))


def recommendation(answer: Recommendation) -> RenderableType:
    """What to use and why, what else, and what not and why not."""
    if answer.choice is None:
        lines = [
            Text(
                gettext("Nothing measured meets the constraints (scenario {scenario}).", scenario=answer.scenario),
                style="bold red",
            )
        ]
    else:
        told = gettext("Recommended for the scenario {scenario}: {name}", scenario=answer.scenario, name=answer.choice)
        lines = [Text(told, style="bold green")]
    lines += [Text(f"  {reason}") for reason in answer.reasons]
    for place, item in enumerate(answer.ranking, start=1):
        lines.append(Text(f"{place}. " + gettext("{name}: {reason}", name=item.name, reason=item.reason)))
    for left in answer.excluded:
        lines.append(Text(gettext("Excluded: {name}: {reason}", name=left.name, reason=left.reason), style="dim"))
    return Group(*lines)


def row(found: Row) -> RenderableType:
    """One contender, one figure a line."""
    table = plain_table((gettext("figure"), gettext("value")))
    for column in comparison_columns():
        add(table, heading(column), column.cell(found))
    add(table, gettext("KL noise floor"), number(found.kl_noise_floor, ".2g"))
    add(table, gettext("choice, minus the reference's"), number(found.choice_difference, "+.3f"))
    add(table, gettext("its 95 % interval"), interval(found.choice_difference_ci95, "+.3f"))
    add(table, gettext("decode, share of the machine's limit"), percent(found.decode_limit_fraction))
    add(table, gettext("prefill, share of the machine's limit"), percent(found.prefill_limit_fraction))
    for column in further_columns():
        add(table, heading(column), column.cell(found))
    missing = found.kind != "unquantized" and found.kl_mean is None
    advice = gettext("What accuracy it lost is not measured: name the unquantized model with --reference")
    hint = [Text(advice, style="dim")]
    return Group(table, *tasks(found), *input_shift(found), *_notes(found.notes), *(hint if missing else []))


def input_shift(found: Row) -> list[RenderableType]:
    """The linears whose inputs are least like calibration's; nothing where that was not measured."""
    if found.input_shift is None:
        return []
    limit = found.input_shift.limit
    score = gettext("score") if limit is None else gettext("score (chance: up to {limit})", limit=format(limit, ".1f"))
    heads = (
        *(gettext("inputs of"), gettext("99.9 % reach, x"), gettext("profile away"), gettext("beyond calibration")),
        *(gettext("clipped"), score),
    )
    table = plain_table(heads, right=(1, 2, 3, 4, 5))
    for group in found.input_shift.groups[:WORST_LINEARS]:
        more = gettext(" and {count} more", count=len(group.linears) - 1) if len(group.linears) > 1 else ""
        add(
            table,
            group.linears[0] + more,
            f"{group.reach_ratio:.3f}",
            f"{group.profile_distance:.3f}",
            percent(group.beyond),
            percent(group.clipped),
            number(group.score, ".1f"),
        )
    return [table]


def tasks(found: Row) -> list[RenderableType]:
    """What lm-eval's tasks gave, a line for each metric; nothing where none was run."""
    table = plain_table((gettext("task"), gettext("metric"), gettext("value"), gettext("standard error")), right=(2, 3))
    for name, metrics in found.tasks.items():
        for metric, value in metrics.items():
            if "_stderr" not in metric:
                add(table, name, metric, number(value, ".4f"), number(metrics.get(stderr_name(metric)), ".4f"))
    return [table] if found.tasks else []


def stderr_name(metric: str) -> str:
    """``acc,strict`` has its standard error under ``acc_stderr,strict``."""
    name, comma, kind = metric.partition(",")
    return f"{name}_stderr{comma}{kind}"


def quantize_report(report: QuantizeReport) -> RenderableType:
    """What was written, how small it is, and where rounding cost most."""
    facts = plain_table((gettext("figure"), gettext("value")))
    add(facts, gettext("written to"), str(report.path))
    add(
        facts,
        gettext("recipe"),
        gettext("{recipe}, format {format}", recipe=report.recipe.name, format=report.recipe.format),
    )
    add(facts, gettext("size"), size(report.bytes))
    add(facts, gettext("smaller by"), percent(report.compression))
    add(facts, gettext("bits/weight"), number(report.bits_per_weight, ".2f"))
    add(
        facts,
        gettext("time"),
        duration(report.seconds) + (gettext(" (resumed)") if report.resumed and report.seconds else ""),
    )
    add(facts, gettext("peak RAM"), size(report.peak_rss_bytes))
    if report.tuning:
        left = sum(block.after / (block.before or 1.0) for block in report.tuning) / len(report.tuning)
        add(
            facts,
            gettext("tuning"),
            gettext("leaves {share} of the error of blocks' outputs on held-out text", share=percent(left)),
        )
    worst = sorted(report.layers, key=lambda layer: layer.relative_error, reverse=True)[:WORST_LINEARS]
    linears = plain_table(
        (gettext("costliest linears"), gettext("bits/weight"), gettext("relative error")), right=(1, 2)
    )
    for layer in worst:
        add(linears, layer.linear, f"{layer.bits_per_weight:.2f}", f"{layer.relative_error:.2e}")
    hint = Text(
        gettext("Try it: {command}", command=f'quern generate {shlex.quote(str(report.path))} --prompt "..."'),
        style="dim",
    )
    return Group(facts, *([linears] if worst else []), *_notes(report.notes), hint)


def inspection(found: Inspection) -> RenderableType:
    """Every tensor and the totals."""
    coded = found.loaded_bytes is not None
    further = (gettext("coded bits"), gettext("entropy")) if coded else ()
    columns = (
        *(gettext("tensor"), gettext("shape"), gettext("codec"), gettext("granularity"), gettext("bits")),
        *(*further, gettext("bytes")),
    )
    table = plain_table(columns, right=range(4, len(columns)))
    for count, item in alike(found.tensors):
        shape = " x ".join(map(str, item.shape if count == 1 else (count, *item.shape)))
        entropy = (number(item.coded_bits, ".3f"), number(item.entropy, ".3f")) if coded else ()
        add(table, item.name, shape, item.codec, item.granularity, f"{item.bits:g}", *entropy, f"{item.bytes:,}")
    total = gettext(
        "{tensors} tensors, {parameters} parameters, {bits} bits/weight, {size} on disk",
        tensors=len(found.tensors),
        parameters=format(found.parameters, ","),
        bits=format(found.bits_per_weight, ".2f"),
        size=size(found.bytes),
    )
    if found.loaded_bytes is not None:
        total += gettext(", tensors of {size} when loaded", size=size(found.loaded_bytes))
    if found.recipe:
        total += gettext(", recipe {recipe}", recipe=found.recipe)
    return Group(table, Text(total, style="bold"), *_cache_sizes(found), *_notes(found.notes))


def alike(tensors: Iterable[TensorRow]) -> list[tuple[int, TensorRow]]:
    """Each tensor by itself, but those of a block's experts that are stored alike as one row, and how many it stands for."""
    groups: dict[tuple[str, object], list[TensorRow]] = {}
    for item in tensors:
        name = _EXPERT.sub(".experts.*.", item.name)
        groups.setdefault((name, (item.shape, item.codec, item.granularity, item.bits)), []).append(item)
    rows = []
    for (name, _), items in groups.items():
        first = items[0] if len(items) == 1 else replace(items[0], name=name)
        coded = [
            (item.coded_bits, item.entropy)
            for item in items
            if item.coded_bits is not None and item.entropy is not None
        ]
        means = [sum(values) / len(coded) for values in zip(*coded, strict=True)] if coded else [None, None]
        size = sum(item.bytes for item in items)
        rows.append((len(items), replace(first, bytes=size, coded_bits=means[0], entropy=means[1])))
    return rows


def _cache_sizes(found: Inspection) -> list[RenderableType]:
    """What keys and values take beside the weights, for some lengths of a text."""
    if not found.cache_bytes_per_token:
        return []
    lengths = [length for length in CACHE_LENGTHS if found.context is None or length < found.context]
    lengths += [] if found.context is None else [found.context]
    columns = [gettext("{count} tokens", count=format(length, ",")) for length in lengths]
    table = plain_table(
        (gettext("key/value cache"), gettext("bytes/token"), *columns), right=tuple(range(1, 2 + len(columns)))
    )
    for precision, each in found.cache_bytes_per_token.items():
        add(table, precision, f"{each:,}", *(size(each * length) for length in lengths))
    return [Text(""), table]


def hardware(found: dict[str, Any]) -> RenderableType:
    """What the machine is and what it was measured to do."""
    table = plain_table((gettext("what"), gettext("value")))
    for key, value in found.items():
        if key not in ("measured", "warnings"):
            add(table, key.replace("_", " "), _words(key, value))
    for key, value in (found["measured"] or {}).items():
        if key == "gemm_gop_s":
            for dtype, rates in value.items():
                add(table, gettext("matrix products in {dtype}, Gop/s", dtype=dtype), _by_threads(rates))
        elif key == "read_bandwidth_gb_s":
            add(table, gettext("reading memory, GB/s"), _by_threads(value))
        else:
            add(table, key.replace("_", " "), _words(key, value))
    return Group(
        table, *(Text(gettext("warning: {warning}", warning=warning), style="yellow") for warning in found["warnings"])
    )


def _by_threads(rates: dict[str, float] | None) -> str:
    if not rates:
        return gettext("not measured")
    told = (
        ngettext("{rate} ({count} thread)", "{rate} ({count} threads)", int(count), rate=format(rate, "g"), count=count)
        for count, rate in rates.items()
    )
    return ", ".join(told)


def _words(key: str, value: Any) -> str:
    if value is None or value == [] or value == {}:
        return gettext("none") if isinstance(value, list) else gettext("not measured")
    if key.endswith("bytes") and isinstance(value, int):
        return size(value)
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_words(name, item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(_words(key, item) for item in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def catalogue(found: dict[str, Any]) -> RenderableType:
    """The shipped recipes by technique, and the names that a recipe may use."""
    recipes = plain_table((gettext("technique"), gettext("recipe"), gettext("what it does")))
    for technique, names in found["techniques"].items():
        for position, name in enumerate(names):
            add(recipes, "" if position else technique, name, found["recipes"][name])
    choices = plain_table((pgettext("of a recipe", "choice"), gettext("known names")))
    for choice, names in found["choices"].items():
        add(choices, choice, ", ".join(names))
    return Group(recipes, choices)


def _notes(notes: Iterable[str]) -> list[Text]:
    return [Text(gettext("note: {note}", note=note), style="yellow") for note in notes]
