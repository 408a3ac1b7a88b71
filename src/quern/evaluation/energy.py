"""Energy, where the machine counts it: RAPL, for processors. Never an estimate.

It counts whole packages, so other work on the machine is in the figure.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

POWERCAP = Path("/sys/class/powercap")
WATTS_AT_MOST = 1000.0
"""No processor package draws more; so long after its last reading a counter may have wrapped more than once."""

Value = TypeVar("Value")


class Meter(Protocol):
    """Counts the energy of something while it runs."""

    def measure(self, work: Callable[[], Value]) -> tuple[Value, float | None]:
        """What ``work`` returns, and the joules meanwhile; None where the counter did not give a sound figure."""
        ...


def find_meter() -> Meter | None:
    """The meter of the processors; None where their counters cannot be read."""
    return RaplMeter.find()


@dataclass(frozen=True)
class RaplMeter:
    """Running average power limit counters of all processor packages and their memory (Linux powercap).

    Files ``energy_uj`` count microjoules up to ``max_energy_range_uj`` and then start at 0 again. Core and uncore are
    parts of their package, ``psys`` contains all packages: neither is added.
    """

    domains: tuple[Path, ...]

    @classmethod
    def find(cls, powercap: Path | None = None) -> RaplMeter | None:
        """Packages and memory with readable counters; None without one, or if one of the packages refuses."""
        found = []
        for domain in sorted((powercap or POWERCAP).glob("intel-rapl:*")):
            try:
                name = (domain / "name").read_text().strip()
                if name.startswith(("package", "dram")):
                    _microjoules(domain)
                    found.append(domain)
            except (OSError, ValueError):
                return None
        return cls(tuple(found)) if found else None

    def measure(self, work: Callable[[], Value]) -> tuple[Value, float | None]:
        """``work`` between two readings of all counters."""
        before = [_microjoules(domain) for domain in self.domains]
        begin = time.perf_counter()
        value = work()
        seconds = time.perf_counter() - begin
        total = 0
        for domain, start in zip(self.domains, before):
            wrap = int((domain / "max_energy_range_uj").read_text())
            if seconds * WATTS_AT_MOST * 1e6 > wrap:
                return value, None
            total += (_microjoules(domain) - start) % wrap
        return value, total / 1e6


def _microjoules(domain: Path) -> int:
    return int((domain / "energy_uj").read_text())
