"""`quern serve` under load: 64 clients, some of whom vanish, read slowly or send what is no request, and kill -9.

    python benchmarks/serving.py [MODEL] [--recipe balanced] [--clients 64] [--seconds 300] [--seed 0] [-o FOLDER] [--dry]

MODEL (default: the bundled one) is quantized and served. Every question is asked alone first; then all clients ask at once,
and each answer that comes whole has to be the lone one, byte for byte. Of every eight clients one goes away in the middle of
answers, one reads slowly, and one sends malformed requests (tools/malformed_requests.py). Resident memory has to stay flat
within 2 % from when a third of the time is over and the server keeps as many finished texts as it ever does (a short run
does not get there, and fails). Then the server is killed while it answers, and another one on the same port answers every
question as before.
Exit code 1 where one of that does not hold. The result is results/serving_*.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from measured import quantize_in_child, write_result

from quern.generation.prefixes import MOST_KEPT
from quern.serving.server import listen

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))
from malformed_requests import Malformed, malformed_requests, problem  # noqa: E402

MODEL = ROOT / "models" / "python-7m"
KINDS = ("streamed", "whole", "streamed", "whole", "streamed", "vanishing", "slow", "malformed")
FLAT = 0.02
PARALLEL, QUEUE = 8, 256
QUESTIONS = 64
STARTING = 120.0
TEXT = "import self return class def for in value list name path data with open read write index key item None"
WORDS = TEXT.split()


@dataclass
class Seen:
    """What the clients saw."""

    answers: Counter[str] = field(default_factory=Counter)
    """Whole ones, by the kind of client."""
    wrong: list[dict[str, str]] = field(default_factory=list)
    vanished: int = 0
    malformed: Counter[str] = field(default_factory=Counter)
    """Malformed requests by status."""
    unexpected: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[float, int]] = field(default_factory=list)
    """Seconds and resident bytes, once as many texts are kept as ever are."""


class Server:
    """``quern serve`` as a person starts it."""

    def __init__(self, artifact: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-c", "from quern.cli.main import run; run()", "serve", str(artifact)]
        limits = ["--parallel", str(PARALLEL), "--queue", str(QUEUE)]
        begin = time.monotonic()
        self.process = subprocess.Popen([*command, "--port", str(port), *limits], stderr=subprocess.DEVNULL)
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > begin + STARTING:
                raise SystemExit("the server does not start")
            time.sleep(0.05)
        self.starting = time.monotonic() - begin

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=1).status_code == 200
        except httpx.HTTPError:
            return False

    def resident(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def end(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait(30)


def questions(seed: int) -> list[dict[str, Any]]:
    """Completions of several lengths; every other one begins as others do."""
    draw = random.Random(seed)
    common = " ".join(draw.choice(WORDS) for _ in range(120))
    found = []
    for number in range(QUESTIONS):
        own = " ".join(draw.choice(WORDS) for _ in range(draw.randrange(4, 60)))
        text = f"{common} {own}" if number % 2 else own
        found.append({"prompt": text, "max_tokens": draw.choice((8, 16, 32, 64)), "temperature": 0, "ignore_eos": True})
    return found


async def whole(client: httpx.AsyncClient, question: dict[str, Any]) -> str:
    """The answer in one piece."""
    response = await client.post("/v1/completions", json=question)
    response.raise_for_status()
    return str(response.json()["choices"][0]["text"])


async def streamed(
    client: httpx.AsyncClient, question: dict[str, Any], pieces: int | None = None, pause: float = 0
) -> str:
    """The answer in pieces; ``pieces``: go away after so many; ``pause``: seconds of rest after each."""
    text = ""
    async with client.stream("POST", "/v1/completions", json={**question, "stream": True}) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(str(chunk["error"]))
            text += chunk["choices"][0]["text"]
            if pieces is not None and (pieces := pieces - 1) <= 0:
                break
            if pause:
                await asyncio.sleep(pause)
    return text


async def one_client(
    kind: str, number: int, url: str, until: float, expected: list[tuple[Any, str]], seen: Seen
) -> None:
    """Asks, one question after the other, until the time is over."""
    draw = random.Random(f"{kind} {number}")
    requests = iter(malformed_requests(number, 10**9))
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:
        while time.monotonic() < until:
            question, right = draw.choice(expected)
            try:
                if kind == "malformed":
                    await asyncio.sleep(draw.uniform(0, 0.2))
                    sent = next(requests)
                    answer = await send(url, sent)
                    seen.malformed[answer[9:12].decode("latin-1") or "none"] += 1
                    if wrong := problem(sent, answer):
                        seen.unexpected[f"{sent.name} to {sent.path}: {wrong}"] += 1
                    continue
                if kind == "vanishing":
                    await streamed(client, {**question, "max_tokens": 512}, pieces=draw.randrange(1, 6))
                    seen.vanished += 1
                    continue
                if kind == "whole":
                    found = await whole(client, question)
                else:
                    pause = draw.uniform(0, 0.3) if kind == "slow" else 0
                    found = await streamed(client, question, pause=pause)
                seen.answers[kind] += 1
                if found != right:
                    seen.wrong.append({"kind": kind, "prompt": question["prompt"], "answer": found, "alone": right})
            except Exception as error:
                seen.unexpected[f"{kind}: {type(error).__name__}: {str(error)[:100]}"] += 1


async def send(url: str, sent: Malformed) -> bytes:
    """All that a malformed request is answered with, until the connection is closed."""
    parts, found = httpx.URL(url), b""
    reader, writer = await asyncio.open_connection(parts.host, parts.port)
    with contextlib.suppress(OSError):
        try:
            writer.write(sent.raw)
            async with asyncio.timeout(300 if sent.whole else 0.5):
                await writer.drain()
                while piece := await reader.read(65536):
                    found += piece
        except TimeoutError:
            pass
        finally:
            writer.close()
            await writer.wait_closed()
    return found


async def watch(server: Server, begin: float, until: float, seen: Seen) -> None:
    """Resident memory, twice a second."""
    async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as client:
        while time.monotonic() < until:
            if (await figures(client))["quern_kept_texts"] >= MOST_KEPT:
                seen.memory.append((round(time.monotonic() - begin, 2), server.resident()))
            await asyncio.sleep(0.5)


async def figures(client: httpx.AsyncClient) -> dict[str, float]:
    """What ``/metrics`` says of its one model."""
    lines = [line for line in (await client.get("/metrics")).text.splitlines() if not line.startswith("#")]
    return {name.partition("{")[0]: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


async def load(server: Server, options: argparse.Namespace, expected: list[tuple[Any, str]]) -> Seen:
    """All clients at once."""
    seen, begin = Seen(), time.monotonic()
    until = begin + options.seconds
    async with asyncio.TaskGroup() as group:
        group.create_task(watch(server, begin, until, seen))
        for number in range(options.clients):
            kind = KINDS[number % len(KINDS)]
            group.create_task(one_client(kind, number, server.url, until, expected, seen))
    return seen


async def ask_alone(url: str, asked: list[dict[str, Any]]) -> list[str]:
    """One question after the other."""
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:
        return [await whole(client, question) for question in asked]


async def killed_while_answering(server: Server, asked: list[dict[str, Any]]) -> int:
    """SIGKILL with 16 answers under way; how many broke off."""
    async with httpx.AsyncClient(base_url=server.url, timeout=120, trust_env=False) as client:
        tasks = [asyncio.create_task(streamed(client, {**one, "max_tokens": 512})) for one in asked[:16]]
        await asyncio.sleep(1)
        server.end(signal.SIGKILL)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    return sum(isinstance(one, BaseException) for one in ended)


def flatness(memory: list[tuple[float, int]], seconds: float) -> dict[str, float] | None:
    """Resident memory after the warm-up: medians of its first and last fifth, and how much the latter is more."""
    after = [size for at, size in memory if at > seconds / 3]
    if len(after) < 20:
        return None
    fifth = len(after) // 5
    first, last = statistics.median(after[:fifth]), statistics.median(after[-fifth:])
    return {"first_bytes": first, "last_bytes": last, "growth": last / first - 1, "largest_bytes": max(after)}


async def idle(url: str) -> bool:
    """Whether nothing is being answered any more, 10 seconds after the last client went."""
    async with httpx.AsyncClient(base_url=url) as client:
        for _ in range(100):
            found = await figures(client)
            if found["quern_running"] == found["quern_waiting"] == 0:
                return True
            await asyncio.sleep(0.1)
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=MODEL)
    parser.add_argument("--recipe", default="balanced")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/serving"))
    parser.add_argument("--dry", action="store_true", help="Write no result file.")
    options = parser.parse_args()
    if options.clients < len(KINDS) or options.seconds < 5:
        parser.error(f"--clients: at least {len(KINDS)}; --seconds: at least 5")
    shutil.rmtree(options.output, ignore_errors=True)
    artifact = options.output / "artifact"
    quantize_in_child(model=str(options.model), output=str(artifact), recipe=options.recipe)
    with contextlib.closing(listen("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    asked = questions(options.seed)
    server = Server(artifact, port)
    try:
        alone = asyncio.run(ask_alone(server.url, asked))
        seen = asyncio.run(load(server, options, list(zip(asked, alone, strict=True))))
        quiet = asyncio.run(idle(server.url))
        after = asyncio.run(ask_alone(server.url, asked)) == alone
        broken = asyncio.run(killed_while_answering(server, asked))
        server = Server(artifact, port)
        again = asyncio.run(ask_alone(server.url, asked)) == alone
    finally:
        server.end(signal.SIGKILL)
    memory = flatness(seen.memory, options.seconds)
    checks = {
        "no wrong answer": not seen.wrong, "no unexpected failure": not seen.unexpected,
        "memory is flat": memory is not None and memory["growth"] <= FLAT, "nothing is left running": quiet,
        "the same answers afterwards": after, "answers broke off when it was killed": broken > 0,
        "the same answers after a restart": again,
    }  # fmt: skip
    for name, holds in checks.items():
        print(f"{'ok    ' if holds else 'FAILED'} {name}", flush=True)
    for failure, count in seen.unexpected.most_common(10):
        print(f"       {count} times {failure}", flush=True)
    told = f"{sum(seen.answers.values())} answers, {len(seen.wrong)} wrong, {seen.vanished} clients vanished, "
    grown = "not judged: the run is too short" if memory is None else f"{memory['growth']:+.2%}"
    print(f"{told}{sum(seen.malformed.values())} malformed requests, memory {grown}", flush=True)
    content = {
        "model": options.model.name, "recipe": options.recipe, "clients": options.clients, "seconds": options.seconds,
        "seed": options.seed, "parallel": PARALLEL, "queue": QUEUE, "checks": checks, "answers": seen.answers,
        "wrong": seen.wrong[:20], "vanished": seen.vanished, "malformed": seen.malformed, "unexpected": seen.unexpected,
        "memory": memory, "memory_mb": [[at, round(size / 1e6, 1)] for at, size in seen.memory[::10]],
        "restart_seconds": round(server.starting, 1), "broken_by_kill": broken,
    }  # fmt: skip
    if not options.dry:
        print(write_result(f"serving_{options.model.name}", content))
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
