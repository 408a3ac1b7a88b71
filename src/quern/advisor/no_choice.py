"""What to say where no row keeps within every limit: what comes nearest, what loses least, and what to change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from quern.advisor.constraints import Constraints, Miss, memory_of
from quern.advisor.deployment import licence_of, targets_of
from quern.advisor.scoring import loss_of, positive
from quern.core.results import Row
from quern.core.units import bytes_text, rounded_up, significant
from quern.formats.base import FORMATS


def no_choice_text(
    rows: Sequence[Row], misses: Mapping[int, Sequence[Miss]], constraints: Constraints, refused: Mapping[int, str]
) -> str:
    """Why there is no choice, which row comes nearest to the limits, and how to get the least lossy one."""
    if not misses:
        place = min(refused)
        return f"No row has the numbers that this scenario weighs; {rows[place].name}, for one: {refused[place]}."

    def distance(place: int) -> tuple[float, float, str]:
        return sum(miss.doublings for miss in misses[place]), *_loss_first(rows[place])

    default = "the default ceiling of the loss" if constraints.max_loss is None else ""
    text = f"No row keeps within every limit ({'; '.join(filter(None, [str(constraints), default]))}). "
    comparable = [place for place in misses if all(miss.by_degree for miss in misses[place])]
    if comparable:
        nearest = min(comparable, key=distance)
        text += f"{rows[nearest].name} comes nearest: {refused[nearest]}. "
    else:
        text += _out_of_reach(misses, constraints)
    if constraints.max_loss is None:
        only_loss = [place for place in misses if [miss.limit for miss in misses[place]] == ["loss"]]
        if only_loss:
            row = rows[min(only_loss, key=lambda place: _loss_first(rows[place]))]
            text += f"{row.name} misses only the ceiling of the loss; to accept it, allow {_loss_to_allow(row)}."
            return text if len(only_loss) == 1 else text[:-1] + ": it loses least of those that miss nothing else."
    return text + _least_lossy_text(rows, misses, constraints.context)


def _out_of_reach(misses: Mapping[int, Sequence[Miss]], constraints: Constraints) -> str:
    """Where no row comes nearest, because each misses something that is no matter of degree: what no row has at all."""
    lacking = {miss.limit for missed in misses.values() for miss in missed if not miss.by_degree}
    every = [limit for limit in lacking if all(limit in {miss.limit for miss in missed} for missed in misses.values())]
    if "target" in every:
        writes = [name for name in FORMATS if constraints.target in FORMATS.get(name).runtimes]
        hint = f"quern writes such in format {' or '.join(writes)}" if writes else "another tool has to make one"
        return f"None of them loads in {constraints.target}; {hint}. "
    if "licence" in every:
        return f"None of them was made by a tool under {' or '.join(constraints.licences or ())}. "
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
    figure = f" (KL {significant(loss)})" if loss is not None else ""
    changes = [_change(miss, row, context) for miss in misses[place]]
    return f"{row.name} loses least{figure}; to accept it, {' and '.join(changes)}."


def _change(miss: Miss, row: Row, context: int | None) -> str:
    """What would let ``row`` pass the limit."""
    decode, memory = positive(row.decode_tokens_per_s), memory_of(row, context)
    changes = {
        "size": f"allow a size of {bytes_text(rounded_up(row.bytes))}",
        "memory": f"allow a peak memory of {bytes_text(rounded_up(memory))}" if memory else None,
        "speed": f"ask for at most {_floor(decode)} tokens/s" if decode else None,
        "agreement": None
        if row.top1_agreement is None
        else f"ask for an agreement of at most {_floor(row.top1_agreement)}",
        "loss": None if row.kl_mean is None else f"allow a loss of {_loss_to_allow(row)}",
        "target": f"take another runtime (it loads in {', '.join(targets_of(row)) or 'nothing that is known'})",
        "licence": f"allow the licence {licence_of(row)}",
    }
    return changes[miss.limit] or f"measure its {'KL' if miss.limit == 'loss' else miss.limit}"


def _loss_to_allow(row: Row) -> str:
    return f"{math.ceil((loss_of(row) or 0.0) * 1000) / 1000:.3f}"


def _floor(value: float) -> str:
    return f"{math.floor(value * 1000) / 1000:g}"
