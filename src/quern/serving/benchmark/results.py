"""What a benchmark of a server found. The terms are those of ``vllm bench serve``.

TTFT: from sending a request to its first token. ITL (inter-token latency): between two pieces of a stream. TPOT: time per
output token after the first. E2EL: from sending to the end of the answer. All times are the client's, in milliseconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quern.serving.benchmark.client import Timing


@dataclass(frozen=True)
class Milliseconds:
    """A distribution of times."""

    mean: float
    median: float
    p99: float


@dataclass(frozen=True)
class Load:
    """How requests come: ``rate`` a second as a Poisson process, or ``concurrency`` at once, each followed by the next."""

    rate: float | None = None
    concurrency: int | None = None


@dataclass(frozen=True)
class LoadResult:
    """What one load found. Figures are of answers that came whole; None where there are none."""

    load: Load
    completed: int
    failed: int
    errors: dict[str, int]
    """How often each failure came."""
    seconds: float
    """From the first request to the end of the last answer."""
    prompt_tokens: int
    cached_tokens: int | None
    """Of the prompts, what the server had read before; None where it does not tell."""
    answer_tokens: int
    request_throughput: float
    """A second, as the next two."""
    output_throughput: float
    total_token_throughput: float
    ttft_ms: Milliseconds | None
    tpot_ms: Milliseconds | None
    itl_ms: Milliseconds | None
    e2el_ms: Milliseconds | None


@dataclass(frozen=True)
class Workload:
    """What is asked."""

    prompt_tokens: int = 512
    answer_tokens: int = 128
    shared_prefix: float = 0.0
    """Share of each prompt that all of them begin with."""
    requests: int = 32
    """Of each load."""
    seed: int = 0


@dataclass(frozen=True)
class MeasuredServer:
    """Which server was measured."""

    url: str
    model: str
    """As requests name it."""
    path: str | None
    """What quern served; None for a server that ran already."""
    version: str | None
    """What ``/version`` says, or the ``Server`` header."""


@dataclass(frozen=True)
class ServingResults:
    """A benchmark of one server under several loads."""

    created: str
    """UTC, ISO 8601."""
    quern_version: str
    hardware: dict[str, Any]
    """Of the machine that asked, which is the server's own where quern started it."""
    versions: dict[str, str]
    server: MeasuredServer
    workload: Workload
    loads: list[LoadResult]
    interrupted: bool
    """Whether it was stopped before all loads were done; the last one then has fewer requests."""


def summary(load: Load, timings: Sequence[Timing], seconds: float) -> LoadResult:
    """Figures of the requests of one load, which took ``seconds`` from the first to the last."""
    whole = [one for one in timings if one.error is None]
    prompts, answers = sum(one.prompt_tokens for one in whole), sum(one.answer_tokens for one in whole)
    cached = [one.cached_tokens for one in whole if one.cached_tokens is not None]
    seconds = max(seconds, 1e-9)
    return LoadResult(
        load=load,
        completed=len(whole),
        failed=len(timings) - len(whole),
        errors=dict(Counter(one.error for one in timings if one.error is not None)),
        seconds=seconds,
        prompt_tokens=prompts,
        cached_tokens=sum(cached) if cached else None,
        answer_tokens=answers,
        request_throughput=len(whole) / seconds,
        output_throughput=answers / seconds,
        total_token_throughput=(prompts + answers) / seconds,
        ttft_ms=_spread([one.first for one in whole if one.first is not None]),
        tpot_ms=_spread(
            [(one.end - one.first) / (one.answer_tokens - 1) for one in whole if one.first and one.answer_tokens > 1]
        ),
        itl_ms=_spread([gap for one in whole for gap in one.gaps]),
        e2el_ms=_spread([one.end for one in whole]),
    )


def _spread(seconds: Sequence[float]) -> Milliseconds | None:
    if not seconds:
        return None
    values = 1000 * np.asarray(seconds)
    return Milliseconds(float(values.mean()), float(np.median(values)), float(np.percentile(values, 99)))
