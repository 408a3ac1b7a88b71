"""Where the results come from, as the page shows it: model, machine, versions, recipes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from quern.core.results import Results, Row
from quern.core.text.language import gettext, ngettext
from quern.core.text.units import bytes_text, limit_text, seconds_text, significant
from quern.report.wording import protocol_text


def model_name(results: Results) -> str:
    """The last part of the model's path."""
    return results.model.path.rstrip("/").rpartition("/")[2] or results.model.path


def model_line(results: Results) -> str:
    """Architecture, number of parameters and size in bf16, as far as known."""
    model = results.model
    parts = [model.architecture, gettext("{count} parameters", count=parameters_text(model.parameters))]
    if model.bf16_bytes:
        parts.append(gettext("{size} in bf16", size=bytes_text(model.bf16_bytes)))
    return " · ".join(filter(None, parts))


def parameters_text(count: int) -> str:
    """A number of parameters: 72700000000 -> "72.7 B"."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{significant(count / size)} {unit}"
    return str(count)


def machine_line(hardware: Mapping[str, Any]) -> str:
    """The processor's name and how many cores were used, as far as the results say."""
    name, cores = hardware.get("cpu_model"), hardware.get("usable_cores")
    if not isinstance(name, str) or not name:
        return ""
    if not isinstance(cores, int):
        return name
    return ngettext("{processor}, {cores} core", "{processor}, {cores} cores", cores, processor=name, cores=cores)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested plain data as (words, text) pairs: units are written out, figures by number of threads on one line."""
    for key, value in values.items():
        name = f"{prefix}{_fact_name(key)}"
        if isinstance(value, Mapping) and value and all(count.isdigit() for count in value):
            rates = [
                ngettext(
                    "{count} thread: {rate}", "{count} threads: {rate}", int(count), count=count, rate=_fact(key, rate)
                )
                for count, rate in value.items()
            ]
            yield name, ", ".join(rates)
        elif isinstance(value, Mapping) and value:
            yield from flatten(value, f"{name}: ")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            for place, item in enumerate(value):
                yield from flatten(item if isinstance(item, Mapping) else {"value": item}, f"{name} {place}: ")
        else:
            yield name, _fact(key, value)


def _fact_name(key: str) -> str:
    """A key as words; a unit that the value is not written with stands in brackets."""
    for ending, unit in (("_gb_s", " (GB/s)"), ("_gop_s", " (10^9 operations/s)")):
        if key.endswith(ending):
            return key.removesuffix(ending).replace("_", " ") + unit
    return key.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")


def _fact(key: str, value: object) -> str:
    if value is None:
        return gettext("not measured")
    if isinstance(value, list | tuple | Mapping):
        return ", ".join(str(item) for item in value) or gettext("none")
    if isinstance(value, bool):
        return gettext("yes") if value else gettext("no")
    if isinstance(value, int | float):
        if key.endswith("_bytes"):
            return bytes_text(value)
        if key.endswith("_seconds"):
            return seconds_text(value)
        return f"{value:,}" if isinstance(value, int) else significant(value)
    return str(value)


def limits_text(row: Row) -> str:
    """What the fractions of the machine's limits refer to; empty where the row has none or does not say."""
    parts = []
    if row.limit_read_gb_s is not None and row.decode_limit_fraction is not None:
        share = limit_text(row.decode_limit_fraction)
        rate = significant(row.limit_read_gb_s, 4)
        parts.append(gettext("decode {share}: reading {rate} GB/s", share=share, rate=rate))
    if row.limit_gemm_gop_s is not None and row.prefill_limit_fraction is not None:
        parts.append(
            gettext(
                "prefill {share}: {rate} x 10^9 operations/s in {dtype}",
                share=limit_text(row.prefill_limit_fraction),
                rate=significant(row.limit_gemm_gop_s, 4),
                dtype=row.limit_gemm_dtype,
            )
        )
    elif row.tool is not None and row.prefill_tokens_per_s is not None:
        parts.append(gettext("prefill: no limit, because the tool does not declare its arithmetic"))
    if row.limit_read_gb_s is not None or row.limit_gemm_gop_s is not None:
        parts.append(gettext("probed in the start of the run that timed this row"))
    return gettext("; ").join(parts)


def recipe_view(row: Row) -> dict[str, Any]:
    """What made a row: recipe, artifact, engine, notes."""
    text = None if row.recipe is None else json.dumps(row.recipe, indent=2, ensure_ascii=False)
    return {
        "name": row.name,
        "engine": row.engine,
        "tool": _tool(row),
        "sha256": row.artifact_sha256,
        "json": text,
        "description": (row.recipe or {}).get("description", ""),
        "notes": [*row.notes, *([gettext("Limits: {limits}", limits=limits)] if (limits := limits_text(row)) else [])],
    }


def _tool(row: Row) -> str:
    """Another tool with its licence, runtime and home page; empty for quern's own rows."""
    if row.tool is None:
        return ""
    facts = (row.tool.licence, gettext("measured in {runtime}", runtime=row.tool.runtime), row.tool.homepage)
    return f"{row.tool.name} {row.tool.version} ({', '.join(filter(None, facts))})"


def run_facts(results: Results) -> list[tuple[str, str]]:
    """Name and value of what identifies the run."""
    model = results.model
    measured = [(gettext("Measured"), protocol_text(results.protocol, results.rows))] if results.protocol else []
    return [
        (gettext("Model"), model.path),
        (gettext("Model SHA-256"), model.sha256),
        (gettext("Parameters"), f"{model.parameters:,}"),
        (gettext("Measured at"), results.created),
        ("quern", results.quern_version),
        (gettext("Metrics version"), str(results.metrics_version)),
        (gettext("Seed"), str(results.seed)),
        *measured,
    ]
