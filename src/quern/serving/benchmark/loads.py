"""Requests that come as a load says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import httpx

from quern.core.seeds import generator
from quern.serving.benchmark.client import Timing, completion
from quern.serving.benchmark.results import Load, Workload
from quern.serving.benchmark.target import Prompt, Target


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds at which ``count`` requests come, ``rate`` a second on average: a Poisson process, the first one at once."""
    gaps = generator(seed, "arrivals", rate).exponential(1 / rate, count - 1)
    return [0.0, *(float(time) for time in gaps.cumsum())]


async def run_load(
    client: httpx.AsyncClient,
    target: Target,
    load: Load,
    prompts: Iterator[Prompt],
    workload: Workload,
    tell: Callable[[Timing], None],
) -> None:
    """Ask for the completions of ``prompts``; ``tell`` gets each one's times when it is done."""

    async def ask(prompt: Prompt) -> None:
        tell(await completion(client, target.completions, target.asked(prompt, workload.answer_tokens)))

    async with asyncio.TaskGroup() as group:
        if load.rate is not None:
            begin = time.perf_counter()
            for at, prompt in zip(arrivals(load.rate, workload.requests, workload.seed), prompts, strict=True):
                await asyncio.sleep(begin + at - time.perf_counter())
                group.create_task(ask(prompt))
            return

        async def worker() -> None:
            for prompt in prompts:
                await ask(prompt)

        for _ in range(min(load.concurrency or 1, workload.requests)):
            group.create_task(worker())
