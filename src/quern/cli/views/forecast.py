"""What a person sees of a forecast, and of where a model can be run: figures first, then how each was come by."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from quern.advisor.forecasting.results import Forecast, Foretold, Placed, Placements, RecipeForecast
from quern.cli.views.columns import add
from quern.cli.views.columns import table as plain_table
from quern.core.text.language import gettext, translatable
from quern.core.text.units import bytes_text, seconds_text, significant

TEXTS = {
    "artifact_bytes": translatable("artifact"),
    "quantize_seconds": translatable("time to quantize"),
    "quantize_memory": translatable("memory to quantize"),
    "quantize_disk": translatable("disk to quantize"),
    "run_memory": translatable("memory to run"),
    "prefill": translatable("prefill"),
    "decode": translatable("decode"),
    "context": translatable("longest context, {cache} cache"),
    "figure": translatable("figure"),
    "value": translatable("value"),
    "basis": translatable("basis"),
    "derivation": translatable("derivation"),
    "unknown": translatable("not known"),
    "head": translatable(
        "{model}: {parameters} parameters, {bytes} in bf16; on {machine} ({description}), context {context}"
    ),
    "recipe": translatable("{recipe} ({format}), run by {runtime}{bits}"),
    "bits": translatable(", {bits} bits per weight"),
    "warning": translatable("warning: {warning}"),
    "note": translatable("note: {note}"),
    "machine": translatable("machine"),
    "runtime": translatable("runtime"),
    "size": translatable("size"),
    "memory": translatable("memory"),
    "limit": translatable("of"),
    "kl": translatable("KL elsewhere"),
    "why": translatable("why"),
    "score": translatable("score"),
    "choice": translatable("Choice for {scenario}: {recipe} as {format} in {runtime} on {machine}."),
    "nothing": translatable("Nothing fits."),
    "missing": translatable("What does not fit, nearest first:"),
    "losses": translatable(
        "KL elsewhere: measured on {model}, not on this model. Speeds are predicted, none was measured."
    ),
    "recipe_": translatable("recipe"),
    "tokens": translatable("{count} tokens"),
    "counted": translatable("counted"),
    "measured": translatable("measured"),
    "predicted": translatable("predicted"),
}
FIGURES = (
    "artifact_bytes", "quantize_seconds", "quantize_memory", "quantize_disk", "run_memory", "prefill", "decode",
)  # fmt: skip


def forecast_view(found: Forecast) -> RenderableType:
    """One table for each recipe."""
    head = gettext(
        TEXTS["head"],
        model=found.model, parameters=f"{found.parameters:,}", bytes=bytes_text(found.bf16_bytes),
        machine=found.machine.name, description=found.machine.description, context=found.context,
    )  # fmt: skip
    warnings = [Text(gettext(TEXTS["warning"], warning=warning), style="yellow") for warning in found.warnings]
    return Group(Text(head, style="bold"), *warnings, *(part for one in found.recipes for part in _recipe(one)))


def _recipe(one: RecipeForecast) -> list[RenderableType]:
    bits = "" if one.bits_per_weight is None else gettext(TEXTS["bits"], bits=f"{one.bits_per_weight:.2f}")
    title = gettext(TEXTS["recipe"], recipe=one.recipe, format=one.format, runtime=one.runtime, bits=bits)
    table = plain_table(tuple(gettext(TEXTS[key]) for key in ("figure", "value", "basis", "derivation")), right=(1,))
    for name in FIGURES:
        figure: Foretold = getattr(one, name)
        add(table, gettext(TEXTS[name]), value_text(figure), gettext(TEXTS[figure.basis]), figure.derivation)
    for cache, figure in one.contexts.items():
        add(
            table,
            gettext(TEXTS["context"], cache=cache),
            value_text(figure),
            gettext(TEXTS[figure.basis]),
            figure.derivation,
        )
    notes = [Text(gettext(TEXTS["note"], note=note), style="yellow") for note in one.notes]
    return [Text(""), Text(title), table, *notes]


def value_text(figure: Foretold) -> str:
    """A value with its unit."""
    if figure.value is None:
        return gettext(TEXTS["unknown"])
    if figure.unit == "bytes":
        return bytes_text(figure.value)
    if figure.unit == "seconds":
        return seconds_text(figure.value)
    if figure.unit == "tokens":
        return gettext(TEXTS["tokens"], count=f"{figure.value:,.0f}")
    return f"{significant(figure.value)} {figure.unit}"


def placements_view(found: Placements) -> RenderableType:
    """Where the model runs, best first, and what does not fit."""
    parts: list[RenderableType] = []
    if found.choice is None:
        parts.append(Text(gettext(TEXTS["nothing"]), style="bold"))
    else:
        chosen = found.choice
        said = gettext(
            TEXTS["choice"],
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
        parts += [Text(""), Text(gettext(TEXTS["missing"])), _places(found.excluded)]
    parts.append(Text(gettext(TEXTS["losses"], model=found.losses_of)))
    return Group(*parts, *(Text(gettext(TEXTS["note"], note=note), style="yellow") for note in found.notes))


def _places(rows: list[Placed]) -> RenderableType:
    columns = ("machine", "recipe_", "runtime", "size", "memory", "limit", "prefill", "decode", "kl", "score", "why")
    titles = tuple(gettext(TEXTS[name]) for name in columns)
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
