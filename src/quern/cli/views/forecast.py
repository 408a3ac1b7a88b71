"""What a person sees of a forecast, and of where a model can be run: figures first, then how each was come by."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from quern.advisor.forecasting.results import Forecast, Foretold, Placed, Placements, RecipeForecast
from quern.cli.views.columns import add
from quern.cli.views.columns import table as plain_table
from quern.core.text.units import bytes_text, seconds_text, significant

# Every text of this module in one place, so that catalogues can take them over.
TEXTS = {
    "artifact_bytes": "artifact",
    "quantize_seconds": "time to quantize",
    "quantize_memory": "memory to quantize",
    "quantize_disk": "disk to quantize",
    "run_memory": "memory to run",
    "prefill": "prefill",
    "decode": "decode",
    "context": "longest context, {} cache",
    "figure": "figure",
    "value": "value",
    "basis": "basis",
    "derivation": "derivation",
    "unknown": "not known",
    "head": "{model}: {parameters} parameters, {bytes} in bf16; on {machine} ({description}), context {context}",
    "recipe": "{recipe} ({format}), run by {runtime}{bits}",
    "bits": ", {:.2f} bits per weight",
    "warning": "warning: {}",
    "note": "note: {}",
    "machine": "machine",
    "runtime": "runtime",
    "size": "size",
    "memory": "memory",
    "limit": "of",
    "kl": "KL elsewhere",
    "why": "why",
    "score": "score",
    "choice": "Choice for {scenario}: {recipe} as {format} in {runtime} on {machine}.",
    "nothing": "Nothing fits.",
    "missing": "What does not fit, nearest first:",
    "losses": "KL elsewhere: measured on {}, not on this model. Speeds are predicted, none was measured.",
}
FIGURES = (
    "artifact_bytes", "quantize_seconds", "quantize_memory", "quantize_disk", "run_memory", "prefill", "decode",
)  # fmt: skip


def forecast_view(found: Forecast) -> RenderableType:
    """One table for each recipe."""
    head = TEXTS["head"].format(
        model=found.model, parameters=f"{found.parameters:,}", bytes=bytes_text(found.bf16_bytes),
        machine=found.machine.name, description=found.machine.description, context=found.context,
    )  # fmt: skip
    warnings = [Text(TEXTS["warning"].format(warning), style="yellow") for warning in found.warnings]
    return Group(Text(head, style="bold"), *warnings, *(part for one in found.recipes for part in _recipe(one)))


def _recipe(one: RecipeForecast) -> list[RenderableType]:
    bits = "" if one.bits_per_weight is None else TEXTS["bits"].format(one.bits_per_weight)
    title = TEXTS["recipe"].format(recipe=one.recipe, format=one.format, runtime=one.runtime, bits=bits)
    table = plain_table(tuple(TEXTS[key] for key in ("figure", "value", "basis", "derivation")), right=(1,))
    for name in FIGURES:
        figure: Foretold = getattr(one, name)
        add(table, TEXTS[name], value_text(figure), figure.basis, figure.derivation)
    for cache, figure in one.contexts.items():
        add(table, TEXTS["context"].format(cache), value_text(figure), figure.basis, figure.derivation)
    notes = [Text(TEXTS["note"].format(note), style="yellow") for note in one.notes]
    return [Text(""), Text(title), table, *notes]


def value_text(figure: Foretold) -> str:
    """A value with its unit."""
    if figure.value is None:
        return TEXTS["unknown"]
    if figure.unit == "bytes":
        return bytes_text(figure.value)
    if figure.unit == "seconds":
        return seconds_text(figure.value)
    if figure.unit == "tokens":
        return f"{figure.value:,.0f} tokens"
    return f"{significant(figure.value)} {figure.unit}"


def placements_view(found: Placements) -> RenderableType:
    """Where the model runs, best first, and what does not fit."""
    parts: list[RenderableType] = []
    if found.choice is None:
        parts.append(Text(TEXTS["nothing"], style="bold"))
    else:
        chosen = found.choice
        said = TEXTS["choice"].format(
            scenario=found.scenario,
            recipe=chosen.recipe,
            format=chosen.format,
            runtime=chosen.runtime,
            machine=chosen.machine,
        )
        parts.append(Text(said, style="bold"))
    if found.ranking:
        parts.append(_places(found.ranking))
    if found.excluded:
        parts += [Text(""), Text(TEXTS["missing"]), _places(found.excluded)]
    parts.append(Text(TEXTS["losses"].format(found.losses_of)))
    return Group(*parts, *(Text(TEXTS["note"].format(note), style="yellow") for note in found.notes))


def _places(rows: list[Placed]) -> RenderableType:
    columns = ("machine", "recipe_", "runtime", "size", "memory", "limit", "prefill", "decode", "kl", "score", "why")
    titles = tuple("recipe" if name == "recipe_" else TEXTS[name] for name in columns)
    table = plain_table(titles, right=range(3, 10))
    for row in rows:
        add(
            table, f"{row.machine} ({row.kind})", f"{row.recipe} ({row.format})", row.runtime,
            bytes_text(row.artifact_bytes), bytes_text(row.memory_bytes), bytes_text(row.memory_limit),
            value_text(row.prefill), value_text(row.decode),
            "" if row.kl_elsewhere is None else significant(row.kl_elsewhere),
            "" if row.score is None else f"{row.score:+.2f}", row.reason,
        )  # fmt: skip
    return table
