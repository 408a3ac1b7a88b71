"""Where the results come from, as the page shows it: model, machine, versions, recipes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from quern.core.results import Results, Row
from quern.core.units import bytes_text, limit_text, seconds_text, significant
from quern.report.wording import protocol_text


def model_name(results: Results) -> str:
    """The last part of the model's path."""
    return results.model.path.rstrip("/").rpartition("/")[2] or results.model.path


def model_line(results: Results) -> str:
    """Architecture, number of parameters and size in bf16, as far as known."""
    model = results.model
    parts = [model.architecture, f"{parameters_text(model.parameters)} parameters"]
    if model.bf16_bytes:
        parts.append(f"{bytes_text(model.bf16_bytes)} in bf16")
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
    return f"{name}, {cores} core{'' if cores == 1 else 's'}" if isinstance(cores, int) else name


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested plain data as (words, text) pairs: units are written out, figures by number of threads on one line."""
    for key, value in values.items():
        name = f"{prefix}{_fact_name(key)}"
        if isinstance(value, Mapping) and value and all(count.isdigit() for count in value):
            rates = [
                f"{count} thread{'' if count == '1' else 's'}: {_fact(key, rate)}" for count, rate in value.items()
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
        return "not measured"
    if isinstance(value, list | tuple | Mapping):
        return ", ".join(str(item) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
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
        parts.append(f"decode {share}: reading {significant(row.limit_read_gb_s, 4)} GB/s")
    if row.limit_gemm_gop_s is not None and row.prefill_limit_fraction is not None:
        rate = f"{significant(row.limit_gemm_gop_s, 4)} x 10^9 operations/s in {row.limit_gemm_dtype}"
        parts.append(f"prefill {limit_text(row.prefill_limit_fraction)}: {rate}")
    elif row.tool is not None and row.prefill_tokens_per_s is not None:
        parts.append("prefill: no limit, because the tool does not declare its arithmetic")
    if row.limit_read_gb_s is not None or row.limit_gemm_gop_s is not None:
        parts.append("probed in the start of the run that timed this row")
    return "; ".join(parts)


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
        "notes": [*row.notes, *([f"Limits: {limits}"] if (limits := limits_text(row)) else [])],
    }


def _tool(row: Row) -> str:
    """Another tool with its licence, runtime and home page; empty for quern's own rows."""
    if row.tool is None:
        return ""
    facts = (row.tool.licence, f"measured in {row.tool.runtime}", row.tool.homepage)
    return f"{row.tool.name} {row.tool.version} ({', '.join(filter(None, facts))})"


def run_facts(results: Results) -> list[tuple[str, str]]:
    """Name and value of what identifies the run."""
    model = results.model
    measured = [("Measured", protocol_text(results.protocol, results.rows))] if results.protocol else []
    return [
        ("Model", model.path),
        ("Model SHA-256", model.sha256),
        ("Parameters", f"{model.parameters:,}"),
        ("Measured at", results.created),
        ("quern", results.quern_version),
        ("Metrics version", str(results.metrics_version)),
        ("Seed", str(results.seed)),
        *measured,
    ]
