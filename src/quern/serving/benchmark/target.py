"""The server that is measured: where it is, what it calls its model, and prompts of a given length for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

from quern.core.errors import UserError, option
from quern.core.seeds import generator
from quern.serving.benchmark.client import completion
from quern.serving.benchmark.results import Workload

Prompt = str | list[int]
ENGLISH = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend"
)
WORDS = ENGLISH.split()
CALIBRATION = 64
"""Words that tell how many tokens a word is, where a server does not tokenize."""


@dataclass
class Target:
    """A running server. ``base`` ends in what stands before ``/completions``."""

    base: str
    key: str | None = None
    model: str = ""
    version: str | None = None
    tokens: tuple[int, ...] = ()
    """Some of its tokens; none where it does not tokenize texts."""
    _per_word: float = 1.0

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        return {} if self.key is None else {"authorization": f"Bearer {self.key}"}

    @property
    def completions(self) -> str:
        """Where completions are asked for."""
        return f"{self.base}/completions"

    @property
    def root(self) -> str:
        """The server without its API's path."""
        parts = urlsplit(self.base)
        return f"{parts.scheme}://{parts.netloc}"

    def asked(self, prompt: Prompt, answer_tokens: int) -> dict[str, Any]:
        """A greedy completion of exactly so many tokens, where the server knows ``ignore_eos``."""
        return self._named(prompt=prompt, max_tokens=answer_tokens, temperature=0, ignore_eos=True)

    async def meet(self, client: httpx.AsyncClient) -> None:
        """Learn its model's name, its version and its tokens. Raises ``UserError`` where no such server answers."""
        try:
            listed = await client.get(f"{self.base}/models")
            told = await client.get(f"{self.root}/version")
            self.model = self.model or _first_model(listed)
            asked = self._named(prompt=ENGLISH, content=ENGLISH, add_special_tokens=False)
            tokens = await client.post(f"{self.root}/tokenize", json=asked)
        except (httpx.HTTPError, OSError) as error:
            raise UserError(f"nothing answers at {self.base}: {error or type(error).__name__}") from None
        if listed.status_code in (401, 403):
            raise UserError(f"{self.base} wants a key; give it as {option('key', '--api-key')}")
        self.version = _field(told, "version") or listed.headers.get("server")
        ids = _field(tokens, "tokens")
        if isinstance(ids, list) and ids and all(type(token) is int for token in ids):
            self.tokens = tuple(dict.fromkeys(ids))
        else:
            await self._measure_words(client)

    def _named(self, **asked: Any) -> dict[str, Any]:
        return {**({"model": self.model} if self.model else {}), **asked}

    async def _measure_words(self, client: httpx.AsyncClient) -> None:
        found = await completion(client, self.completions, self.asked(" ".join(WORDS[:CALIBRATION]), 1))
        if found.error is not None:
            raise UserError(f"{self.completions} does not complete a text: {found.error}")
        if found.prompt_tokens == 0:
            raise UserError(f"{self.base} neither tokenizes texts nor tells in `usage` how many tokens a prompt has")
        self._per_word = found.prompt_tokens / len(WORDS[:CALIBRATION])

    def prompts(self, workload: Workload, *names: object) -> Iterator[Prompt]:
        """Those of one load, which ``names`` spell: random tokens, or words where the server does not tokenize.

        All loads begin with the same shared part.
        """
        size = workload.prompt_tokens
        shared = round(workload.shared_prefix * size)
        first = self._drawn(shared, generator(workload.seed, "shared"))
        rest = generator(workload.seed, "prompts", *names)
        for _ in range(workload.requests):
            drawn = [*first, *self._drawn(size - shared, rest)]
            yield [int(token) for token in drawn] if self.tokens else " ".join(map(str, drawn))

    def _drawn(self, tokens: int, draw: np.random.Generator) -> Sequence[int | str]:
        if self.tokens:
            return [int(token) for token in draw.choice(self.tokens, tokens)]
        return [str(word) for word in draw.choice(WORDS, round(tokens / self._per_word))]


def base_of(url: str) -> str:
    """What stands before ``/completions``: ``url`` with ``/v1`` where it has no path. Raises ``UserError``."""
    try:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid:
        raise UserError(
            f"{option('url', '--url')} has to be the address of a server, such as http://127.0.0.1:8080; got {url!r}"
        )
    path = parts.path.rstrip("/").removesuffix("/completions")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def _first_model(listed: httpx.Response) -> str:
    """The first one that a server lists, as requests name it; nothing where it lists none."""
    models = _field(listed, "data")
    first = models[0] if isinstance(models, list) and models else {}
    return str(first.get("id", "")) if isinstance(first, dict) else ""


def _field(response: httpx.Response, name: str) -> Any:
    """A field of a JSON object that was answered; None for any other answer."""
    try:
        found = response.json() if response.status_code == 200 else None
    except ValueError:
        return None
    return found.get(name) if isinstance(found, dict) else None
