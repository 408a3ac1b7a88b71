"""Measures: what is measured of a contender, in which unit, which way is better, how, and how it is written.

One file of this folder declares one measure and registers it under its name. The fields of a row, the columns of the
terminal's table and of the report, ``results.json`` and the table in ``docs/results.md`` follow from the declaration.
A file is imported wherever results are shown, and in the processes of other tools: heavy libraries are imported inside
``run``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from quern.core.engine import LoadedModel
from quern.core.registry import Registry
from quern.core.results import Figure, Row
from quern.core.text.language import gettext
from quern.core.text.units import significant
from quern.evaluation.choice import Option, load_options
from quern.evaluation.energy import Meter
from quern.evaluation.reference_cache import ReferenceKey, ReferenceLogits
from quern.evaluation.texts import Window, load_windows

Stage = Literal["rounds", "memory", "text", "choices"]
"""When a contender's process is asked. ``rounds``: in every timed round, which alternate with those of other contenders;
``memory``: after the rounds, before scoring adds memory of its own; ``text``: over the windows of text; ``choices``: over
the multiple-choice items, if there are any. ``rounds`` may be left out by the caller."""

Better = Literal["low", "high"]
Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a run may use. Files are read when they are first asked for."""

    advance: Callable[[int], None]
    """To be called now and then with the number of steps done: tokens of text for stage ``text``, options for
    ``choices``. A process that says nothing for minutes counts as stuck."""
    windows_file: str | None = None
    options_file: str | None = None
    cache: str | None = None
    """Folder of the reference logits."""
    key: dict[str, Any] | None = None
    """Under which they lie there."""
    prompt: tuple[int, ...] = ()
    """Token ids that a timed round begins with."""
    decode_tokens: int = 0
    """Tokens that a timed round generates after the first."""
    meter: Meter | None = None
    """Counts energy; None where no counter is readable."""

    @cached_property
    def windows(self) -> tuple[Window, ...]:
        """The text, as token ids."""
        assert self.windows_file is not None, "windows belong to the stage text"
        return load_windows(Path(self.windows_file))

    @cached_property
    def reference(self) -> ReferenceLogits | None:
        """The unquantized model's logits of these windows; None where no reference was given."""
        if self.cache is None or self.key is None:
            return None
        return ReferenceLogits(Path(self.cache), ReferenceKey.from_json(self.key))

    @cached_property
    def options(self) -> list[Option]:
        """All options of the multiple-choice items."""
        assert self.options_file is not None, "options belong to the stage choices"
        return load_options(Path(self.options_file))


Run = Callable[[LoadedModel, Given], Any]
"""What the contender's process does; returns plain JSON data. Raises ``NonFiniteError`` for logits with NaN or infinity."""
Summarize = Callable[[Any, int], Figure | None]
"""From what ``run`` returned (in stage ``rounds``: the list of what it returned in each round) and the seed of resampling to
the figure; None where there is none, for instance without a reference."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """The declaration of one measure."""

    name: str
    """Of the figure in ``results.json`` and of the column; lower case with underscores."""
    title: str
    """Heading of the report's column."""
    help: str
    """One sentence on what it is: the report's hint and the table in ``docs/results.md``."""
    unit: str
    """``bytes``, ``s`` and ``fraction`` are written in a unit that suits the size; any other, such as ``nats/token``, stands
    in the heading; empty for a number without a unit."""
    better: Better
    """Whether less or more of it is wished for."""
    place: int = 1000
    """Columns stand in this order; those of one place by name."""

    stage: Stage | None = None
    """When ``run`` is called; None: the row has it from elsewhere (``field``)."""
    run: Run | None = None
    """Measures that name the same function share its result: it runs once for all of them."""
    summarize: Summarize | None = None

    field: str | None = None
    """The row's field that holds the value; None: ``Row.figures`` holds it under ``name``."""
    interval_field: str | None = None
    """The row's field that holds the interval."""

    digits: int = 3
    """Significant digits in the report, where the unit does not decide."""
    detail: Callable[[Row], list[str]] | None = None
    """Lines below the value in the report; None: the interval."""
    against_reference: bool = False
    """Whether it compares with the unquantized model, which then cannot be best in it."""
    in_report: bool = True
    only_beside_other_tools: bool = False
    """Whether the report leaves it out where no other tool took part."""
    heading: str = ""
    """Of the terminal's column, broken at spaces; empty: the title with its unit."""
    terminal: Literal["comparison", "row", "nowhere"] = "comparison"
    """Where the terminal shows it; ``row``: only where one row is shown alone, a figure a line."""
    form: str = ".3g"
    """Format on the terminal, where the unit does not decide."""
    interval_heading: str = ""
    """Of a further column of the terminal with the interval; empty: none."""

    def figure(self, row: Row) -> Figure | None:
        """The row's figure; None where it was not measured."""
        if self.field is None:
            return row.figures.get(self.name)
        value = getattr(row, self.field)
        return None if value is None else Figure(value=value, interval=self._interval(row), unit=self.unit)

    def _interval(self, row: Row) -> Range | None:
        if self.interval_field is not None:
            limits: Range | None = getattr(row, self.interval_field)
            return limits
        spread = (row.speed_spread or {}).get(self.field or "")
        return (spread.low, spread.high) if spread else None

    def value(self, row: Row) -> float | None:
        """The row's value; None where it was not measured."""
        if self.field is not None:
            found: float | None = getattr(row, self.field)
            return found
        figure = self.figure(row)
        return None if figure is None else figure.value

    def range(self, row: Row) -> Range | None:
        """The ends of the interval, or of the range of the timed rounds."""
        figure = self.figure(row)
        return None if figure is None else figure.interval

    @property
    def shown_unit(self) -> str:
        """What stands in the heading: nothing where the unit depends on the size of the value."""
        return "" if self.unit in ("bytes", "s", "fraction") else self.unit


MEASURES: Registry[Measure] = Registry("measure", "quern.evaluation.measures")


def measure(**declared: Any) -> Measure:
    """Declare and register a measure; ``declared`` are the fields of ``Measure``."""
    made = Measure(**declared)
    return MEASURES.add(made.name)(made)


def all_measures() -> list[Measure]:
    """Every measure, in the order of their columns."""
    return sorted((MEASURES.get(name) for name in MEASURES), key=lambda found: (found.place, found.name))


def passes(stage: Stage) -> list[list[Measure]]:
    """The measures of ``stage``; those that share a ``run`` are together, and the first one's name stands for the run."""
    found: dict[Run, list[Measure]] = {}
    for each in all_measures():
        if each.stage == stage:
            assert each.run is not None, f"measure {each.name} has a stage and no run"
            found.setdefault(each.run, []).append(each)
    return list(found.values())


def summarized(members: Iterable[Measure], raw: Any, seed: int) -> dict[str, Figure]:
    """Figures by name from what the shared run of ``members`` returned."""
    found = {}
    for each in members:
        assert each.summarize is not None, f"measure {each.name} has a run and no summarize"
        figure = each.summarize(raw, seed)
        if figure is not None:
            found[each.name] = figure
    return found


def range_lines(limits: Range | None, writer: Callable[[float], str] = significant) -> list[str]:
    """One line "low to high", with a unit that both share written once; no line without limits."""
    if limits is None:
        return []
    low, high = writer(limits[0]), writer(limits[1])
    number, _, unit = low.partition(" ")
    return [gettext("{low} to {high}", low=number if unit == high.partition(" ")[2] else low, high=high)]
