"""What this machine is, and what it can do: read bandwidth and matrix product rates are measured, not looked up."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from quern import _native
from quern.core.machine.foreign_load import ForeignLoad
from quern.core.machine.memory import free_memory, total_memory
from quern.core.machine.parallel import available_threads
from quern.core.results import FOREIGN_LIMIT
from quern.core.text.units import processors_text

if TYPE_CHECKING:
    import torch

INSTRUCTION_SETS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_vbmi"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8"),
    *("neon", "dotprod", "fp16", "bf16", "i8mm", "sve", "sve2"),
)
"""Instruction sets that kernels for quantized weights use: x86-64, then Arm."""
_OTHER_NAMES = {"avx512vbmi": "avx512_vbmi", "asimd": "neon", "asimddp": "dotprod", "asimdhp": "fp16"}
"""Where /proc/cpuinfo names a set differently."""

BUFFER_BYTES = 1 << 30
"""Bytes read to measure bandwidth: so much that a last-level cache has dropped the beginning when the end is read."""
READS = 4
GEMM_SHAPE = (512, 2048, 2048)
"""Rows, inner and columns: a prompt of 512 tokens through a linear of a small model."""
GEMM_SECONDS = 0.25
"""Time after which no further product of one kind is timed."""
GEMM_REPEATS = 5
SLOWER = 0.8
"""A rate with more threads below this share of the one with fewer is doubtful."""

_CPUINFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_NVIDIA_FIELDS = ("name", "memory.total", "memory.free", "driver_version", "compute_cap")


def probe(measure: bool = True, threads: int | None = None) -> dict[str, Any]:
    """Describe the machine, in plain data; at most about 6 s with ``measure``.

    ``cpu_model``, ``architecture``, ``instruction_sets``, ``kernels`` (that can run here, best first),
    ``kernels_in_use``, ``physical_cores``, ``logical_cores``, ``usable_cores`` (by affinity),
    ``ram_bytes`` (what a container may use, where it is limited), ``ram_free_bytes``,
    ``last_level_cache_bytes``, ``os``, ``gpus``, ``load_average`` (1, 5, 15 minutes), and ``measured``, null without
    ``measure``: ``foreign_load`` (processors that others kept busy meanwhile), ``read_bandwidth_gb_s`` (10^9 bytes/s) and
    ``gemm_gop_s`` (10^9 operations/s, a multiplication and an addition being two) of ``float32``, ``bfloat16`` and
    ``int8``, each by number of threads: 1, all usable cores, and ``threads`` if given. Unknown is null.
    ``warnings`` says what makes the measured rates doubtful.
    """
    kernels, in_use = _native.isas(), _native.isa()  # refuses a QUERN_ISA that is none, before anything is measured
    measured = measured_rates(sorted({1, available_threads(), threads or 1})) if measure else None
    return {
        "cpu_model": _cpu_model(),
        "architecture": platform.machine(),
        "instruction_sets": instruction_sets(),
        "kernels": kernels,
        "kernels_in_use": in_use,
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "usable_cores": available_threads(),
        "ram_bytes": total_memory(),
        "ram_free_bytes": free_memory(),
        "last_level_cache_bytes": _last_level_cache(),
        "os": _operating_system(),
        "gpus": gpus(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "measured": measured,
        "warnings": [] if measured is None else rate_warnings(measured),
    }


def rate_warnings(measured: Mapping[str, Any]) -> list[str]:
    """Why what ``measured_rates`` returned is not what the machine can do, a sentence each."""
    if (load := measured["foreign_load"]) > FOREIGN_LIMIT:
        return [
            f"other programs kept {processors_text(load)} busy meanwhile, so these rates are not what the machine can do. "
            "Measure again when nothing else runs"
        ]
    products = {f"matrix products in {name}": rates for name, rates in measured["gemm_gop_s"].items() if rates}
    slower = [
        f"{what}: {rates[more]:g} with {more} threads, but {rates[fewer]:g} with {fewer}"
        for what, rates in {"reading memory": measured["read_bandwidth_gb_s"], **products}.items()
        for fewer, more in pairwise(sorted(rates, key=int))
        if rates[more] < SLOWER * rates[fewer]
    ]
    if not slower:
        return []
    return [
        f"{'; '.join(slower)}. Not all of these threads had a processor for themselves: a limit on this process, or threads "
        "of one core, may be the reason"
    ]


def this_processor() -> dict[str, Any]:
    """``cpu_model``, ``usable_cores`` and ``kernels_in_use`` as in ``probe``, at once: no accelerator is looked for."""
    return {"cpu_model": _cpu_model(), "usable_cores": available_threads(), "kernels_in_use": _native.isa()}


def measured_rates(thread_counts: Sequence[int]) -> dict[str, Any]:
    """The ``measured`` part of ``probe`` for these numbers of threads."""
    import torch

    load = ForeignLoad()
    before = torch.get_num_threads()
    try:
        bandwidth = read_bandwidth(thread_counts, BUFFER_BYTES)
        gemm = {name: gemm_rate(name, thread_counts) for name in ("float32", "bfloat16", "int8")}
    finally:
        torch.set_num_threads(before)
    return {
        "foreign_load": round(load.processors(), 2),
        "read_bandwidth_gb_s": _by_threads(bandwidth),
        "gemm_gop_s": {name: rates and _by_threads(rates) for name, rates in gemm.items()},
    }


def _by_threads(rates: dict[int, float]) -> dict[str, float]:
    """Four significant digits; JSON has no numbers for keys."""
    return {str(count): float(f"{rate:.4g}") for count, rate in rates.items()}


def read_bandwidth(thread_counts: Sequence[int], buffer_bytes: int) -> dict[int, float]:
    """10^9 bytes/s at which so many threads read memory.

    The better of two ways, each the median of several passes over one buffer: a maximum spread by torch over its own
    threads, and one dot product per thread. Hand-written AVX-512 loads were not faster than these.
    """
    import torch

    size = min(buffer_bytes, free_memory() // 4) // 4096 * 4096
    # numpy asks the kernel for huge pages, torch does not; the content must be written, or all pages are the zero page.
    buffer = torch.from_numpy(np.full(size // 4, 0.5, dtype=np.float32))
    result = {}
    for threads in thread_counts:
        torch.set_num_threads(threads)
        seconds = [_median_seconds(buffer.amax, READS)]
        torch.set_num_threads(1)
        with ThreadPoolExecutor(threads) as pool:
            seconds.append(_median_seconds(partial(_dot_products, pool, buffer.tensor_split(threads)), READS))
        result[threads] = size / min(seconds) / 1e9
    return result


def _dot_products(pool: ThreadPoolExecutor, parts: Sequence[torch.Tensor]) -> None:
    list(pool.map(lambda part: part.dot(part), parts))


def gemm_rate(dtype: str, thread_counts: Sequence[int]) -> dict[int, float] | None:
    """10^9 operations/s of a matrix product ``x @ w.T`` in ``float32``, ``bfloat16`` or ``int8`` (int32 sums).

    None where torch has no such product on this machine.
    """
    import torch

    rows, inner, columns = GEMM_SHAPE
    random = torch.Generator().manual_seed(0)
    x, w = torch.randn(rows, inner, generator=random), torch.randn(columns, inner, generator=random)
    if dtype == "int8":
        x, w = (x * 40).clamp(-127, 127).to(torch.int8), (w * 40).clamp(-127, 127).to(torch.int8)
    else:
        x, w = x.to(getattr(torch, dtype)), w.to(getattr(torch, dtype))
    multiply: Callable[[], object] = (lambda: torch._int_mm(x, w.t())) if dtype == "int8" else (lambda: x @ w.t())
    try:
        multiply()
    except (RuntimeError, AttributeError):
        return None
    result = {}
    for threads in thread_counts:
        torch.set_num_threads(threads)
        result[threads] = 2 * rows * inner * columns / _median_seconds(multiply, GEMM_REPEATS, GEMM_SECONDS) / 1e9
    return result


def _median_seconds(work: Callable[[], object], repeats: int, limit_s: float = float("inf")) -> float:
    """Median over at most ``repeats`` runs after a first one to warm up; no further run once ``limit_s`` is over."""
    work()
    seconds: list[float] = []
    while not seconds or (len(seconds) < repeats and sum(seconds) < limit_s):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def instruction_sets(cpuinfo: Path = _CPUINFO) -> list[str]:
    """Those of ``INSTRUCTION_SETS`` that the first processor has, by our names; empty where unknown."""
    flags = set((_cpuinfo_field(("flags", "Features"), cpuinfo) or "").split())
    present = {_OTHER_NAMES.get(flag, flag) for flag in flags}
    return [name for name in INSTRUCTION_SETS if name in present]


def gpus(command: str = "nvidia-smi") -> list[dict[str, Any]]:
    """Name, memory (bytes), driver and compute capability of each GPU that nvidia-smi, or else torch, sees."""
    if shutil.which(command) is None:
        return _torch_gpus()
    try:
        answer = subprocess.run(
            [command, f"--query-gpu={','.join(_NVIDIA_FIELDS)}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return _torch_gpus()
    return [_nvidia_gpu(line) for line in answer.stdout.splitlines() if line.count(",") == len(_NVIDIA_FIELDS) - 1]


def _nvidia_gpu(line: str) -> dict[str, Any]:
    name, total, free, driver, capability = (field.strip() for field in line.split(","))
    return {
        "name": name,
        "memory_bytes": int(total) * 1024**2 if total.isdigit() else None,
        "memory_free_bytes": int(free) * 1024**2 if free.isdigit() else None,
        "driver": driver,
        "compute_capability": capability,
    }


def _torch_gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "memory_free_bytes": torch.cuda.mem_get_info(index)[0],
                "driver": None,
                "compute_capability": f"{properties.major}.{properties.minor}",
            }
        )
    return found


def _cpuinfo_field(names: tuple[str, ...], cpuinfo: Path = _CPUINFO) -> str | None:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in names:
            return value.strip()
    return None


def _cpu_model() -> str | None:
    return _cpuinfo_field(("model name", "Model", "Hardware")) or platform.processor() or None


def _last_level_cache() -> int | None:
    sizes = []
    for path in _CACHES.glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * 1024)
    return max(sizes, default=None)


def _operating_system() -> str:
    try:
        distribution = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        distribution = ""
    return f"{distribution or platform.system()} ({platform.system()} {platform.release()})"
