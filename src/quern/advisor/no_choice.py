"""What to say where no row keeps within every limit: what comes nearest, what loses least, and what to change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from quern.advisor.constraints import Constraints, Miss, memory_of
from quern.advisor.deployment import licence_of, targets_text
from quern.advisor.scoring import loss_of, positive
from quern.core.results import Row
from quern.core.text.language import gettext
from quern.core.text.units import bytes_text, rounded_up, significant
from quern.formats.base import FORMATS


def no_choice_text(
    rows: Sequence[Row], misses: Mapping[int, Sequence[Miss]], constraints: Constraints, refused: Mapping[int, str]
) -> str:
    """Why there is no choice, which row comes nearest to the limits, and how to get the least lossy one."""
    if not misses:
        place = min(refused)
        return gettext(
            "No row has the numbers that this scenario weighs; {name}, for one: {reason}.",
            name=rows[place].name,
            reason=refused[place],
        )

    def distance(place: int) -> tuple[float, float, str]:
        return sum(miss.doublings for miss in misses[place]), *_loss_first(rows[place])

    default = gettext("the default ceiling of the loss") if constraints.max_loss is None else ""
    limits = gettext("; ").join(filter(None, [str(constraints), default]))
    text = gettext("No row keeps within every limit ({limits}). ", limits=limits)
    comparable = [place for place in misses if all(miss.by_degree for miss in misses[place])]
    if comparable:
        nearest = min(comparable, key=distance)
        text += gettext("{name} comes nearest: {reason}. ", name=rows[nearest].name, reason=refused[nearest])
    else:
        text += _out_of_reach(misses, constraints)
    if constraints.max_loss is None:
        only_loss = [place for place in misses if [miss.limit for miss in misses[place]] == ["loss"]]
        if only_loss:
            row = rows[min(only_loss, key=lambda place: _loss_first(rows[place]))]
            told = {"name": row.name, "loss": _loss_to_allow(row)}
            if len(only_loss) == 1:
                return text + gettext("{name} misses only the ceiling of the loss; to accept it, allow {loss}.", **told)
            return text + gettext(
                "{name} misses only the ceiling of the loss; to accept it, allow {loss}: it loses least of those that miss "
                "nothing else.",
                **told,
            )
    return text + _least_lossy_text(rows, misses, constraints.context)


def _out_of_reach(misses: Mapping[int, Sequence[Miss]], constraints: Constraints) -> str:
    """Where no row comes nearest, because each misses something that is no matter of degree: what no row has at all."""
    lacking = {miss.limit for missed in misses.values() for miss in missed if not miss.by_degree}
    every = [limit for limit in lacking if all(limit in {miss.limit for miss in missed} for missed in misses.values())]
    if "target" in every:
        writes = [name for name in FORMATS if constraints.target in FORMATS.get(name).runtimes]
        hint = gettext("another tool has to make one")
        if writes:
            hint = gettext("quern writes such in format {formats}", formats=gettext(" or ").join(writes))
        return gettext("None of them loads in {target}; {hint}. ", target=constraints.target, hint=hint)
    if "licence" in every:
        licences = gettext(" or ").join(constraints.licences or ())
        return gettext("None of them was made by a tool under {licences}. ", licences=licences)
    return ""


def _loss_first(row: Row) -> tuple[float, str]:
    loss = loss_of(row)
    return math.inf if loss is None else loss, row.name


def _least_lossy_text(rows: Sequence[Row], misses: Mapping[int, Sequence[Miss]], context: int | None) -> str:
    """The quantized row of the least loss, of those that suit where any do, and all that would have to be allowed."""
    quantized = [place for place in misses if rows[place].kind != "unquantized"] or list(misses)
    suiting = [place for place in quantized if not {miss.limit for miss in misses[place]} & {"target", "licence"}]
    place = min(suiting or quantized, key=lambda place: _loss_first(rows[place]))
    row, loss = rows[place], loss_of(rows[place])
    figure = gettext(" (KL {loss})", loss=significant(loss)) if loss is not None else ""
    changes = [_change(miss, row, context) for miss in misses[place]]
    return gettext(
        "{name} loses least{figure}; to accept it, {changes}.",
        name=row.name,
        figure=figure,
        changes=gettext(" and ").join(changes),
    )


def _change(miss: Miss, row: Row, context: int | None) -> str:
    """What would let ``row`` pass the limit."""
    decode, memory = positive(row.decode_tokens_per_s), memory_of(row, context)
    if miss.limit == "size":
        return gettext("allow a size of {size}", size=bytes_text(rounded_up(row.bytes)))
    if miss.limit == "memory":
        most = bytes_text(rounded_up(memory)) if memory else None
        return gettext("allow a peak memory of {size}", size=most) if most else gettext("measure its memory")
    if miss.limit == "speed":
        return (
            gettext("ask for at most {rate} tokens/s", rate=_floor(decode)) if decode else gettext("measure its speed")
        )
    if miss.limit == "agreement":
        if row.top1_agreement is None:
            return gettext("measure its agreement")
        return gettext("ask for an agreement of at most {share}", share=_floor(row.top1_agreement))
    if miss.limit == "loss":
        return (
            gettext("measure its KL")
            if row.kl_mean is None
            else gettext("allow a loss of {loss}", loss=_loss_to_allow(row))
        )
    if miss.limit == "target":
        return gettext("take another runtime (it loads in {targets})", targets=targets_text(row))
    return gettext("allow the licence {licence}", licence=licence_of(row))


def _loss_to_allow(row: Row) -> str:
    return f"{math.ceil((loss_of(row) or 0.0) * 1000) / 1000:.3f}"


def _floor(value: float) -> str:
    return f"{math.floor(value * 1000) / 1000:g}"
