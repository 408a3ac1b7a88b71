"""Time to first token, inter-token latency and throughput of a server, load by load."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import importlib.metadata
import math
import platform
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import httpx

import quern
from quern.advisor.hardware import probe
from quern.checkpoint.files import write_json
from quern.core.errors import QuernError, UserError, option
from quern.core.progress import Progress, Silent
from quern.core.text.language import gettext, translatable
from quern.serving.benchmark.client import Timing
from quern.serving.benchmark.loads import run_load
from quern.serving.benchmark.own_server import own_server
from quern.serving.benchmark.results import Load, LoadResult, MeasuredServer, ServingResults, Workload, summary
from quern.serving.benchmark.target import Target, base_of
from quern.serving.server import Served

LONGEST_ANSWER = 3600.0
"""Seconds that a server may let a client wait for the next piece."""
MOST_REQUESTS, MOST_CONCURRENCY, MOST_TOKENS, MOST_RATE = 100_000, 1024, 1 << 20, 10_000.0
PACKAGES = ("torch", "numpy", "httpx")
ANSWERS = translatable("answers")
"""What the bar counts."""
DEFAULT_LOADS = (Load(concurrency=1), Load(concurrency=4), Load(concurrency=8))


def bench_serve(
    model: str | Path | None = None,
    *,
    url: str | None = None,
    loads: Sequence[Load] = DEFAULT_LOADS,
    workload: Workload = Workload(),  # noqa: B008 - it cannot be changed
    name: str = "",
    key: str | None = None,
    parallel: int = 8,
    threads: int | None = None,
    engine: str = "auto",
    cache: str | None = None,
    output: Path | None = None,
    progress: Progress | None = None,
) -> ServingResults:
    """Measure the server at ``url``, or one that serves ``model`` meanwhile, on a free port, with the options that follow.

    ``name``: its model as requests name it, else the first one that it lists. One request warms up before, and is in no
    figure. Interrupted from the keyboard, it returns what was measured so far. ``output``: a JSON file to write, too.
    Raises ``UserError`` for a server that does not answer, and for a load or workload that is none.
    """
    if (model is None) == (url is None):
        raise UserError(
            f"give either a model, which is then served, or {option('url', '--url')} of a server that runs already"
        )
    check(loads, workload)
    if output is not None and output.exists():
        raise UserError(f"{output} exists; choose another {option('output', '--output')}")
    progress = progress or Silent()
    target = Target("", key, name)
    rows: list[LoadResult] = []
    interrupted = False
    with ExitStack() as stack:
        if model is not None:
            served = Served(
                models={Path(model).name or str(model): str(model)},
                port=0,
                parallel=parallel,
                waiting=workload.requests,
                threads=threads,
                engine=engine,
                cache=cache,
            )
            progress.log(gettext("serving {model}", model=model))
            url = stack.enter_context(own_server(served)).url
        target.base = base_of(str(url))
        try:
            asyncio.run(_measure(target, loads, workload, rows, progress))
        except KeyboardInterrupt:
            if not rows:
                raise
            interrupted = True
    found = _results(target, model, workload, rows, interrupted)
    if output is not None:
        write_json(output, dataclasses.asdict(found))
    return found


def _results(
    target: Target, model: str | Path | None, workload: Workload, rows: list[LoadResult], interrupted: bool
) -> ServingResults:
    return ServingResults(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        quern_version=quern.__version__,
        hardware=probe(measure=False),
        versions={"python": platform.python_version(), **{one: importlib.metadata.version(one) for one in PACKAGES}},
        server=MeasuredServer(target.base, target.model, None if model is None else str(model), target.version),
        workload=workload,
        loads=rows,
        interrupted=interrupted,
    )


async def _measure(
    target: Target, loads: Sequence[Load], workload: Workload, rows: list[LoadResult], progress: Progress
) -> None:
    timeout = httpx.Timeout(30.0, read=LONGEST_ANSWER)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(headers=target.headers, timeout=timeout, limits=limits, trust_env=False) as client:
        await target.meet(client)
        await _warm_up(client, target, workload)
        task = progress.task(ANSWERS, workload.requests * len(loads))
        for place, load in enumerate(loads):
            timings: list[Timing] = []

            def tell(one: Timing, timings: list[Timing] = timings) -> None:
                timings.append(one)
                task.advance()

            begin = time.perf_counter()
            try:
                await run_load(client, target, load, target.prompts(workload, place), workload, tell)
            finally:
                if timings:
                    rows.append(summary(load, timings, time.perf_counter() - begin))
        task.done()


async def _warm_up(client: httpx.AsyncClient, target: Target, workload: Workload) -> None:
    found: list[Timing] = []
    prompts = target.prompts(replace(workload, requests=1), "warm-up")
    await run_load(client, target, Load(concurrency=1), prompts, workload, found.append)
    if found[0].error is not None:
        raise UserError(f"{target.completions} fails at a first request: {found[0].error}")
    if found[0].first is None:
        raise QuernError(f"{target.completions} answers without a single token")


def check(loads: Sequence[Load], workload: Workload) -> None:
    """Raise ``UserError`` for what cannot be measured."""
    if not loads:
        raise UserError("nothing to measure: give a load at least")
    for load in loads:
        if load.rate is not None and not (math.isfinite(load.rate) and 0 < load.rate <= MOST_RATE):
            raise UserError(
                f"{option('rate', '--rates')}: requests a second, above 0 and at most {MOST_RATE:g}; got {load.rate:g}"
            )
        if load.concurrency is not None and not 1 <= load.concurrency <= MOST_CONCURRENCY:
            raise UserError(
                f"{option('concurrency', '--concurrency')} is a number from 1 to {MOST_CONCURRENCY}; got {load.concurrency}"
            )
    for spelled, value, most in (
        (option("requests", "--requests"), workload.requests, MOST_REQUESTS),
        (option("prompt_tokens", "--prompt-tokens"), workload.prompt_tokens, MOST_TOKENS),
        (option("answer_tokens", "--answer-tokens"), workload.answer_tokens, MOST_TOKENS),
    ):
        if not 1 <= value <= most:
            raise UserError(f"{spelled} is a number from 1 to {most}; got {value}")
    if not 0 <= workload.shared_prefix <= 1:
        raise UserError(
            f"{option('shared_prefix', '--shared-prefix')} is a share from 0 to 1; got {workload.shared_prefix:g}"
        )
