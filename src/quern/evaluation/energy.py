"""Energy, where the machine counts it: RAPL for processors, NVML (through nvidia-smi) for GPUs. Never an estimate.

Both count the whole device, so other work on the machine is in the figure.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np

POWERCAP = Path("/sys/class/powercap")
WATTS_AT_MOST = 1000.0
"""No processor package draws more; so long after its last reading a counter may have wrapped more than once."""
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=index,power.draw", "--format=csv,noheader,nounits", "-lms", "50")
LEAST_SAMPLES = 4
_STARTING_S = 5.0

Value = TypeVar("Value")


class Meter(Protocol):
    """Counts the energy of something while it runs."""

    def measure(self, work: Callable[[], Value]) -> tuple[Value, float | None]:
        """What ``work`` returns, and the joules meanwhile; None where the counter did not give a sound figure."""
        ...


def find_meter(device: Literal["cpu", "cuda"] = "cpu") -> Meter | None:
    """The meter of the device that does the work; None where none is readable."""
    return RaplMeter.find() if device == "cpu" else GpuMeter.find()


@dataclass(frozen=True)
class RaplMeter:
    """Running average power limit counters of all processor packages and their memory (Linux powercap).

    Files ``energy_uj`` count microjoules up to ``max_energy_range_uj`` and then start at 0 again. Core and uncore are
    parts of their package, ``psys`` contains all packages: neither is added.
    """

    domains: tuple[Path, ...]

    @classmethod
    def find(cls, powercap: Path = POWERCAP) -> RaplMeter | None:
        """Packages and memory with readable counters; None without one, or if one of the packages refuses."""
        found = []
        for domain in sorted(powercap.glob("intel-rapl:*")):
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


@dataclass(frozen=True)
class GpuMeter:
    """Power of all NVIDIA GPUs, sampled every 50 ms by nvidia-smi and integrated by the trapezoid rule."""

    command: tuple[str, ...] = NVIDIA_SMI

    @classmethod
    def find(cls) -> GpuMeter | None:
        """None without nvidia-smi, or if a GPU does not tell its power."""
        if shutil.which(NVIDIA_SMI[0]) is None:
            return None
        try:
            answer = subprocess.run(NVIDIA_SMI[:-2], capture_output=True, text=True, timeout=_STARTING_S, check=True)
            return cls() if [_watts(line) for line in answer.stdout.splitlines()] else None
        except (OSError, ValueError, subprocess.SubprocessError):
            return None

    def measure(self, work: Callable[[], Value]) -> tuple[Value, float | None]:
        """``work`` while nvidia-smi samples; None where it ended before there were a few samples of each GPU."""
        samples: dict[int, list[tuple[float, float]]] = {}
        started = threading.Event()
        with subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:

            def listen() -> None:
                assert process.stdout is not None
                for line in process.stdout:
                    try:
                        index, watts = _watts(line)
                    except ValueError:
                        continue
                    samples.setdefault(index, []).append((time.perf_counter(), watts))
                    started.set()

            listener = threading.Thread(target=listen, daemon=True)
            listener.start()
            try:
                started.wait(_STARTING_S)
                begin = time.perf_counter()
                value = work()
                end = time.perf_counter()
            finally:
                process.kill()
                listener.join()
        return value, integrate(samples, begin, end)


def _watts(line: str) -> tuple[int, float]:
    index, watts = line.split(",")
    return int(index), float(watts)


def integrate(samples: dict[int, list[tuple[float, float]]], begin: float, end: float) -> float | None:
    """Joules between two times, from (time, watts) of each GPU; None with too few samples between them."""
    total = 0.0
    for series in samples.values():
        times, watts = np.array(series).T
        inside = (times > begin) & (times < end)
        if int(inside.sum()) < LEAST_SAMPLES:
            return None
        moments = np.concatenate([[begin], times[inside], [end]])
        levels = np.interp(moments, times, watts)
        total += float(np.sum(np.diff(moments) * (levels[1:] + levels[:-1]) / 2))
    return total if samples else None
