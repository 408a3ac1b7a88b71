"""What an allocation chooses among: for each matrix some plans, with the bytes and the loss of each."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from quern.core.errors import UserError
from quern.core.plan import LinearPlan


@dataclass(frozen=True)
class Candidate:
    """One plan for one matrix."""

    linear: str
    """Full name."""
    plan: LinearPlan
    bytes: int
    """Of tensor data that the artifact stores for it."""
    loss: float
    """Its predicted share of the mean KL divergence, in nats a token."""


@dataclass(frozen=True)
class Option:
    """Plans for the matrices of one group, chosen together."""

    candidates: tuple[Candidate, ...]
    bytes: int
    """Of all of them."""
    read: int
    """Those of these bytes that every decoded token reads."""
    loss: float

    @classmethod
    def of(cls, candidates: Sequence[Candidate], unread: Collection[str] = ()) -> Option:
        """The candidates as one option; ``unread`` are matrices of which a token reads next to nothing."""
        return cls(
            tuple(candidates),
            sum(one.bytes for one in candidates),
            sum(one.bytes for one in candidates if one.linear not in unread),
            sum(one.loss for one in candidates),
        )


Problem = Sequence[Sequence[Option]]
"""For each group of matrices the options, of which one is to be chosen."""


@dataclass(frozen=True)
class Limits:
    """What the chosen options may add up to; None: anything."""

    bytes: int | None = None
    read: int | None = None
    loss: float | None = None

    def met_by(self, options: Iterable[Option]) -> bool:
        """Whether the options, one of each group, keep all limits."""
        sums = totals(options)
        pairs = ((sums.bytes, self.bytes), (sums.read, self.read), (sums.loss, self.loss))
        return all(most is None or value <= most for value, most in pairs)


@dataclass(frozen=True)
class Totals:
    """Sums over the options of all groups."""

    bytes: int
    read: int
    loss: float


def totals(options: Iterable[Option]) -> Totals:
    """What options, one of each group, add up to."""
    options = list(options)
    return Totals(sum(o.bytes for o in options), sum(o.read for o in options), sum(o.loss for o in options))


def useful(options: Sequence[Option]) -> list[Option]:
    """Those for which no other is at most as large and loses at most as much; by bytes, least first."""
    found: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.loss, o.read)):
        if not any(kept.loss <= option.loss and kept.read <= option.read for kept in found):
            found.append(option)
    return found


def grouped(
    candidates: Mapping[str, Sequence[Candidate]], together: Sequence[Sequence[str]], unread: Collection[str] = ()
) -> list[list[Option]]:
    """The options of each group: those matrices ``together`` get one scheme and one rotation, every other its own.

    ``candidates`` by full name. Raises ``UserError`` for matrices that belong together and share no candidate.
    """
    groups: dict[str, tuple[str, ...]] = {name: (name,) for name in candidates}
    for names in together:
        groups |= dict.fromkeys(names, tuple(names))
    return [_options([candidates[name] for name in names], unread) for names in dict.fromkeys(groups.values())]


def _options(members: Sequence[Sequence[Candidate]], unread: Collection[str]) -> list[Option]:
    by_kind = [{(one.plan.scheme, one.plan.rotation): one for one in member} for member in members]
    shared = [kind for kind in by_kind[0] if all(kind in others for others in by_kind)]
    if not shared:
        names = ", ".join(member[0].linear for member in members)
        raise UserError(
            f"{names} are to get one scheme, but no candidate is open to all of them. Change the overrides, or set "
            "allocation: {joined: false}"
        )
    return [Option.of([others[kind] for others in by_kind], unread) for kind in shared]
